"""Where a patch goes: the installed package, a copy of it, or a source checkout, and its version.

Nothing is imported to find out: versions are read from metadata and source as text.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Unraised:
    """A release whose sources state the version of the one before it.

    A checkout that states ``stated`` and whose ``file`` contains ``text`` has ``version``'s code.
    """

    stated: str
    version: str
    file: str
    text: str


@dataclass(frozen=True)
class Project:
    """A project there are patches for: its distribution and its top-level packages."""

    distribution: str
    packages: tuple[str, ...]
    version_file: str | None = None  # a module that states ``__version__`` truly
    unraised: tuple[Unraised, ...] = ()


PROJECTS = {
    "open_clip": Project(
        "open_clip_torch", ("open_clip", "open_clip_train"), "open_clip/version.py"
    ),
    # Its __init__.__version__ has been "0.1.0" in every release. 1.6.2 on PyPI is commit 48de38c of
    # LAION-AI/CLIP_benchmark, file by file, but setup.py was not raised there.
    "clip_benchmark": Project(
        "clip_benchmark",
        ("clip_benchmark",),
        unraised=(
            Unraised(
                "1.6.1",
                "1.6.2",
                "clip_benchmark/metrics/zeroshot_retrieval.py",
                "torch.autocast(device, enabled=amp)",
            ),
        ),
    ),
}


@dataclass(frozen=True)
class Target:
    """A place with a project's packages. ``dist_info`` and ``checkout`` are None where there is none."""

    project: Project
    folder: Path  # holds the packages: site-packages, a checkout, or its src
    version: str
    stated_in: Path  # what the version was read from
    dist_info: Path | None
    checkout: Path | None

    def __str__(self) -> str:
        kind = (
            "installed in"
            if self.dist_info
            else "checkout"
            if self.checkout
            else "package folder in"
        )
        return f"{self.project.distribution} {self.version}, {kind} {self.checkout or self.folder}"

    def locate(self, path: str) -> Path | None:
        """The target's file for a path of the patch, None if it belongs to another layout.

        Modules are in ``folder`` (the patch has upstream's layout, where a leading ``src/`` may precede
        them), ``*.dist-info`` is an installation's, and everything else is a checkout's.
        """
        parts = PurePosixPath(path).parts
        module = parts[1:] if parts[0] == "src" else parts
        if module[0] in self.project.packages:
            return self.folder.joinpath(*module)
        if parts[0].endswith(".dist-info"):
            return self.dist_info.joinpath(*parts[1:]) if self.dist_info else None
        return self.checkout.joinpath(*parts) if self.checkout else None

    def shown(self, path: str) -> str:
        """The target's file for a path of the patch, relative to the target."""
        file = self.locate(path)
        return path if file is None else file.relative_to(self.checkout or self.folder).as_posix()

    def why_left_out(self, path: str) -> str:
        """Why :meth:`locate` has no place for ``path``."""
        if PurePosixPath(path).parts[0].endswith(".dist-info"):
            return "no such folder beside the packages"
        return "only a source checkout has it"


def find_target(project: Project, folder: str | None) -> Target:
    """The target in ``folder``, or the package that this Python would import.

    Raises:
        ValueError: no package there, or no version can be told.
        FileNotFoundError: no such folder.
    """
    if folder == "":
        raise ValueError("--target is empty (an unset variable?); name a folder, or leave it out")
    found = _installed(project) if folder is None else _given(project, Path(folder).expanduser())
    found = found.resolve()
    dist_info = _dist_info(project, found)
    if dist_info is not None:
        version = dist_info.name.removesuffix(".dist-info").rpartition("-")[2]
        return Target(project, found, version, dist_info, dist_info, None)

    version, stated_in, checkout = None, None, None
    for root in (found.parent, found) if found.name == "src" else (found,):
        declared = _declared(root, project)
        if declared is not None:
            checkout, stated_in, version = root, *declared
            break
    if project.version_file and (found / project.version_file).is_file():
        stated_in = found / project.version_file
        version = _search(r"__version__\s*=\s*[\"']([^\"']+)", _read(stated_in))
    if version is None or stated_in is None:
        raise ValueError(_no_version(project, found))
    for release in project.unraised:
        file = found / release.file
        if version == release.stated and file.is_file() and release.text in _read(file):
            version = release.version
    return Target(project, found, version, stated_in, None, checkout)


def _installed(project: Project) -> Path:
    """The folder of the packages that ``import`` would take."""
    folders = {}
    for package in project.packages:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            folders[package] = Path(spec.origin).parent.parent
    if not folders:
        raise ValueError(
            f"{project.distribution} is not installed in the environment of {sys.executable}. "
            "Fix: give --target a site-packages folder or a source checkout"
        )
    if len(set(folders.values())) > 1:
        places = ", ".join(f"{package} in {folder}" for package, folder in folders.items())
        raise ValueError(
            f"{project.distribution} is in two places: {places}. Fix: give --target one of them"
        )
    return next(iter(folders.values()))


def _given(project: Project, folder: Path) -> Path:
    """The folder of the packages for a ``--target``."""
    if not folder.is_dir():
        reason = "not a folder" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"--target {folder}: {reason}")
    folder = folder.resolve()
    candidates = [folder, folder / "src"]
    if folder.name in project.packages:
        candidates.append(folder.parent)
    for candidate in candidates:
        if any((candidate / name / "__init__.py").is_file() for name in project.packages):
            return candidate
    names = " or ".join(f"{name}/" for name in project.packages)
    raise ValueError(
        f"--target {folder}: no {names} with an __init__.py in it or in its src/. "
        "Fix: give a site-packages folder, a source checkout, its src/, or a package's folder"
    )


def _dist_info(project: Project, folder: Path) -> Path | None:
    """The project's ``*.dist-info`` in ``folder``."""
    found = [
        path
        for path in sorted(folder.glob("*.dist-info"))
        if _same(path.name.removesuffix(".dist-info").rpartition("-")[0], project.distribution)
    ]
    if len(found) > 1:
        raise ValueError(
            f"{folder} has the metadata of {len(found)} versions of {project.distribution}: "
            f"{', '.join(path.name for path in found)}. Fix: reinstall {project.distribution}"
        )
    return found[0] if found else None


def _declared(root: Path, project: Project) -> tuple[Path, str | None] | None:
    """(file, version as it states it) where ``root`` is a checkout of ``project``, else None."""
    for name, read in (("setup.py", _setup_arguments), ("pyproject.toml", _project_table)):
        file = root / name
        if file.is_file():
            values = read(_read(file))
            if _same(values.get("name", ""), project.distribution):
                return file, values.get("version")
    return None


def _setup_arguments(source: str) -> dict[str, str]:
    """The literal keywords of the call of ``setup`` in a setup.py."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return {}
    return {
        keyword.arg: keyword.value.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "setup"
        for keyword in call.keywords
        if keyword.arg and isinstance(keyword.value, ast.Constant)
        if isinstance(keyword.value.value, str)
    }


def _project_table(source: str) -> dict[str, str]:
    """``name`` and ``version`` of a pyproject.toml (Python 3.10 has no parser for it)."""
    table = _search(r"(?ms)^\[project\]\s*$(.*?)(?=^\[|\Z)", source) or ""
    return dict(re.findall(r"(?m)^(name|version)\s*=\s*[\"']([^\"']+)[\"']", table))


def _no_version(project: Project, folder: Path) -> str:
    wanted = [f"{project.distribution}-VERSION.dist-info beside the packages"]
    if project.version_file:
        wanted.append(f"a __version__ in {project.version_file}")
    wanted.append(f"a setup.py or pyproject.toml of {project.distribution} with a literal version")
    return (
        f"cannot tell which version of {project.distribution} is in {folder}: it has none of: "
        f"{'; '.join(wanted)}. Fix: give --target the site-packages folder or the checkout itself"
    )


def _same(name: str, distribution: str) -> bool:
    """Whether two distribution names are the same to pip."""
    return re.sub(r"[-_.]+", "-", name).lower() == re.sub(r"[-_.]+", "-", distribution).lower()


def _search(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
