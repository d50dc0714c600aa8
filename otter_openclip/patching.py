"""Patch open_clip or clip_benchmark so that their own commands know ``--loss otter`` and our data sets.

Without a flag the command says what it would change. Each patch is for one release.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

# In a wheel inside the package, in a checkout (installed with -e or not) beside it.
PATCHES = (Path(__file__).parent / "patches", Path(__file__).parents[1] / "patches")


class Project(NamedTuple):
    """What can be patched.

    Attributes:
        distribution: its name on PyPI.
        packages: what it installs.
        strip: leading folders of the patch's paths (``a/src/open_clip/...``) above the packages.
    """

    distribution: str
    packages: tuple[str, ...]
    strip: int


PROJECTS = {
    "open_clip": Project("open_clip_torch", ("open_clip", "open_clip_train"), 2),
    "clip_benchmark": Project("clip_benchmark", ("clip_benchmark",), 1),
}


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
    """Run the command; returns its exit code.

    Raises:
        ValueError: if the packages or a patch for them are not found, or it does not fit.
        RuntimeError: without git, or if it fails where it said that it would not.
    """
    if shutil.which("git") is None:
        raise RuntimeError("there is no git to apply the patch; install git, on the PATH")
    project = PROJECTS[args.project]
    folder = find_packages(project, args.target)
    patch, patched = find_patch(project, folder)
    print(f"{project.distribution} in {folder}: {'patched' if patched else 'not patched'}")
    reverse = patched if args.action == "check" else args.action == "revert"
    if patched != reverse:
        print("Nothing to do.")
        return 0
    changes = _git_apply(project, folder, patch, reverse, "--numstat", "--summary").stdout
    if args.action == "check":
        print(f"--{'revert' if reverse else 'apply'} would change (lines added, taken away):")
        print(changes, end="")
        return 0
    done = _git_apply(project, folder, patch, reverse)
    if done.returncode:
        raise RuntimeError(f"{done.stderr.strip()}\n{_reinstall(project)}")
    print(f"{'Reverted' if reverse else 'Applied'} {patch.name}:\n{changes}", end="")
    if not reverse:
        print("Revert before an upgrade: pip does not know of the files that were added.")
    return 0


def find_packages(project: Project, target: str | None) -> Path:
    """The folder of the project's packages in ``target``, by default where ``import`` finds them.

    Raises:
        ValueError: if they are not there, or in several folders.
    """
    if target is None:
        specs = [importlib.util.find_spec(name) for name in project.packages]
        folders = {Path(spec.origin).parents[1] for spec in specs if spec and spec.origin}
    else:
        start = Path(target).expanduser().resolve()
        places = [start, start / "src", *([start.parent] if start.name in project.packages else [])]
        modules = [f"{name}/__init__.py" for name in project.packages]
        folders = {p for p in places if any((p / module).is_file() for module in modules)}
        # A checkout may have the name of its package.
        folders = {start} if start in folders else folders
    if len(folders) != 1:
        raise ValueError(
            f"{' and '.join(project.packages)} are in {len(folders)} places of "
            f"{target or 'this environment'}: {sorted(map(str, folders))}; give --target a "
            "site-packages folder, a checkout, its src/, or a package's folder"
        )
    return folders.pop().resolve()


def find_patch(project: Project, folder: Path) -> tuple[Path, bool]:
    """The patch for the packages in ``folder``, and whether they have it.

    An installed release must be the one that the patch is for. A checkout's version says too little, so
    there git decides.

    Raises:
        ValueError: if it is for another release, or git can neither apply nor revert it.
    """
    name = project.distribution
    patch = next(path for places in PATCHES for path in places.glob(f"{name}-*.patch"))
    release = patch.stem.rpartition("-")[2]
    installed = {path.stem.rpartition("-")[2] for path in folder.glob(f"{name}-*.dist-info")}
    if installed and release not in installed:
        raise ValueError(
            f"no patch for {name} {' and '.join(sorted(installed))} in {folder}; install the release "
            f"that has one: {release}"
        )
    problems = []
    for patched in (False, True):
        done = _git_apply(project, folder, patch, patched, "--check")
        if done.returncode == 0:
            return patch, patched
        problems.append(done.stderr.strip())
    # Of the two directions, the one in which fewer files are wrong says what was changed.
    problem = min(problems, key=len)
    raise ValueError(
        f"{patch.name} can be neither applied nor reverted in {folder}: {problem}\n"
        f"{_reinstall(project)}"
    )


def _reinstall(project: Project) -> str:
    return (
        "Get the release's files again: pip install --force-reinstall --no-deps "
        f"{project.distribution}; patches/README.md speaks of other versions"
    )


def _git_apply(
    project: Project, folder: Path, patch: Path, reverse: bool, *flags: str
) -> subprocess.CompletedProcess[str]:
    """``git apply`` in ``folder``, which sees no repository around it and no settings of the user's.

    In a repository it would take paths from its root and leave out what is not below ``folder``. What
    the patch has for the other layout, installed or a checkout, is left out.
    """
    installed = any(folder.glob(f"{project.distribution}-*.dist-info"))
    other_layout = "requirements.txt" if installed else "*.dist-info/*"
    direction = ["--reverse"] if reverse else []
    command = ["git", "apply", f"-p{project.strip}", f"--exclude={other_layout}", *direction]
    blind = {"GIT_DIR": os.devnull, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    return subprocess.run(
        [*command, "--whitespace=nowarn", *flags, patch.resolve()],
        cwd=folder,
        env=os.environ | blind | {"LC_ALL": "C"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
