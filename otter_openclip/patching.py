"""Patch open_clip or clip_benchmark so that their own commands know ``--loss otter`` and our data sets.

Without a flag the command says what it would change. Each release has a patch of its own, or none.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from otter_openclip.files import Change, replace_together

# In a wheel inside the package, in a checkout (installed with -e or not) beside it.
PATCHES = (Path(__file__).parent / "patches", Path(__file__).parents[1] / "patches")
PROJECTS = {"open_clip": "open_clip_torch", "clip_benchmark": "clip_benchmark"}  # distributions
PACKAGES = {"open_clip": ("open_clip", "open_clip_train"), "clip_benchmark": ("clip_benchmark",)}
# clip_benchmark 1.6.2 on PyPI is upstream's commit 48de38c, whose setup.py says 1.6.1; this text tells.
UNRAISED = ("clip_benchmark/metrics/zeroshot_retrieval.py", "torch.autocast(device, enabled=amp)")


class Target(NamedTuple):
    """A project's packages, and the checkout around them if there is one."""

    project: str
    packages: Path
    checkout: Path | None
    version: str
    stated_in: Path  # what the version was read from

    def __str__(self) -> str:
        return f"{PROJECTS[self.project]} {self.version} in {self.checkout or self.packages}"

    def locate(self, name: str) -> Path | None:
        """The file for a path of the patch (upstream's layout); None if this layout has none."""
        if name.removeprefix("src/").split("/")[0] in PACKAGES[self.project]:
            return self.packages / name.removeprefix("src/")
        if ".dist-info/" in name:
            return self.packages / name if self.stated_in.suffix == ".dist-info" else None
        return self.checkout and self.checkout / name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument("project", choices=list(PROJECTS), help="what to patch")
    action = parser.add_mutually_exclusive_group()
    flag = {"dest": "action", "action": "store_const"}
    action.add_argument("--check", const="check", help="say what would change (default)", **flag)
    action.add_argument("--apply", const="apply", help="apply the patch", **flag)
    action.add_argument("--revert", const="revert", help="give files their original bytes", **flag)
    parser.set_defaults(action="check")
    parser.add_argument("--target", metavar="DIR", help="site-packages, a copy or a checkout")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code. ValueError, OSError, RuntimeError: nothing was changed."""
    if shutil.which("git") is None:
        raise RuntimeError("there is no git to apply the patch. Fix: install git, on the PATH")
    target = find_target(args.project, args.target)
    patch = find_patch(target)
    names = re.findall(r"^diff --git a/.+ b/(.+)$", patch.read_text(encoding="utf-8"), re.MULTILINE)
    changes, patched, unfit = {}, {}, []
    for name, path in [(name, path) for name in names if (path := target.locate(name))]:
        try:
            changes[name], patched[name] = _examine(patch, name, path)
        except ValueError as error:
            unfit.append(f"\n  {path}: {error}")
    if unfit or not changes:
        raise ValueError(
            f"{target}: {patch.name} can be neither applied nor reverted. Nothing was changed."
            f"{''.join(unfit)}\nFix: get the release's files (pip install --force-reinstall --no-deps "
            f"{PROJECTS[args.project]}=={target.version}), or see patches/README.md for other ones"
        )
    done = sum(patched.values())
    states = {0: "not patched", len(changes): "patched"}
    print(f"{target}: {states.get(done, f'patched in part ({done} of {len(changes)} files)')}")
    reverse = args.action == "revert" or (args.action == "check" and done == len(changes))
    todo = {name: change for name, change in changes.items() if patched[name] == reverse}
    for name in names:
        verb = "as it is" if name in changes else "left out"
        if name in todo:
            _, before, after = todo[name]
            verb = "add" if before is None else "remove" if after is None else "change"
        print(f"  {verb:8}  {name}")
    if args.action == "check":
        print(
            f"Nothing was changed; --{'revert' if reverse else 'apply'} would, {len(todo)} files."
        )
    elif not todo:
        print(f"Nothing to do: {'not patched' if reverse else 'patched already'}.")
    else:
        replace_together([*todo.values()])
        print(f"{'Reverted' if reverse else 'Applied'} {patch.name}: {len(todo)} files.")
        if not reverse and any(before is None for _, before, _ in todo.values()):
            print("Revert before an upgrade: pip does not know of the files that were added.")
    return 0


def find_target(project: str, given: str | None) -> Target:
    """The target in ``given``, or what ``import`` would take; a ValueError if that cannot be told."""
    names = PACKAGES[project]
    if given is None:
        specs = [importlib.util.find_spec(name) for name in names]
        found = {Path(spec.origin).parents[1] for spec in specs if spec and spec.origin}
    else:
        start = Path(given).expanduser().resolve()
        tried = [start, start / "src", *[start.parent] * (start.name in names)] if given else []
        found = set([f for f in tried if any((f / n / "__init__.py").is_file() for n in names)][:1])
    if len(found) != 1:
        where = "this environment" if given is None else f"--target {given!r}"
        raise ValueError(
            f"{' and '.join(names)} are in {len(found)} places of {where}: {sorted(map(str, found))}. "
            "Fix: give --target a site-packages folder, a checkout, its src/, or a package's folder"
        )
    packages = found.pop().resolve()
    infos = sorted(packages.glob(f"{PROJECTS[project]}-*.dist-info"))
    if len(infos) > 1:
        raise ValueError(f"{infos[0]} and {infos[1].name} are there. Fix: reinstall {project}")
    if infos:
        return Target(project, packages, None, infos[0].stem.rpartition("-")[2], infos[0])
    checkout, version, stated_in = None, "", packages
    for root in (packages, packages.parent)[: 1 + (packages.name == "src")]:
        for file in (root / "setup.py", root / "pyproject.toml"):
            table = _read(file).rpartition("[project]\n")[2].split("\n[")[0]
            stated = dict(re.findall(r"""\b(name|version)\s*=\s*["']([^"']+)""", table)[::-1])
            if stated.get("name", "").replace("-", "_") == PROJECTS[project]:
                checkout, version, stated_in = root, stated.get("version", ""), file
    if project == "open_clip":  # the other's __version__ is 0.1.0 in every release
        stated_in = packages / "open_clip/version.py"
        version = "".join(re.findall(r"""__version__\s*=\s*["']([^"']+)""", _read(stated_in)))
    if not version:
        raise ValueError(
            f"cannot tell which version of {project} is in {packages} from a dist-info, setup.py or "
            "pyproject.toml. Fix: give --target the site-packages folder or the checkout itself"
        )
    if version == "1.6.1" and UNRAISED[1] in _read(packages / UNRAISED[0]):
        version = "1.6.2"
    return Target(project, packages, checkout, version, stated_in)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def find_patch(target: Target) -> Path:
    """The patch for the target's version; a ValueError names the versions that have one."""
    files = f"{PROJECTS[target.project]}-*.patch"
    found = {p.stem.rpartition("-")[2]: p for folder in PATCHES for p in sorted(folder.glob(files))}
    if target.version in found:
        return found[target.version]
    raise ValueError(
        f"no patch for {target} (the version is from {target.stated_in}); there are patches for: "
        f"{', '.join(found)}. Fix: install one of these, or make one as patches/README.md describes"
    )


def _examine(patch: Path, name: str, path: Path) -> tuple[Change, bool]:
    """What the patch, or its reverse if the file is patched (True), makes of it; else a ValueError."""
    before = path.read_bytes() if path.exists() else None
    fits, problems = [], []
    for patched in (False, True):
        try:
            after = _git_apply(patch, name, before, reverse=patched)
            if _git_apply(patch, name, after, reverse=not patched) == before:  # to the byte
                fits.append(((path, before, after), patched))
        except ValueError as error:
            problems.append(str(error))
    if len(fits) == 1:
        return fits[0]
    raise ValueError("; reversed: ".join(problems) or "fits in both directions, or in none")


def _git_apply(patch: Path, name: str, content: bytes | None, reverse: bool) -> bytes | None:
    """``content`` as ``git apply`` changes it, blind to repositories and settings; None is no file."""
    with tempfile.TemporaryDirectory(prefix="otter-patch-") as temporary:
        folder = Path(temporary).resolve()
        file = folder / "tree" / name
        file.parent.mkdir(parents=True)
        if content is not None:
            file.write_bytes(content)
        own = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1", "LC_ALL": "C"}
        own |= dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "GIT_CEILING_DIRECTORIES"), str(folder))
        flags = ["--whitespace=nowarn", *["--reverse"] * reverse]
        done = subprocess.run(
            ["git", "apply", *flags, f"--include={name}", patch.resolve()],
            cwd=folder / "tree",
            env={k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise ValueError(done.stderr.strip().replace("error: ", "").replace("\n", ", "))
        return file.read_bytes() if file.exists() else None
