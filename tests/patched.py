"""Copies of installed packages in a folder, patched there."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from otter_openclip import cli
from otter_openclip.patching import PROJECTS

ROOT = Path(__file__).parent.parent


def copy_packages(package: str, folder: Path) -> Path:
    """Copy the installed ``package`` as the patch command needs it: its folders and its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PROJECTS[package].packages:
        (origin,) = importlib.util.find_spec(name).submodule_search_locations
        shutil.copytree(origin, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for metadata in Path(origin).parent.glob(f"{package}*.dist-info"):
        shutil.copytree(metadata, folder / metadata.name)
    return folder


def patch(package: str, folder: Path) -> None:
    assert cli.main(["patch", package, "--apply", "--target", str(folder)]) == 0


def declare(folder: Path, name: str, entry_points: dict[str, dict[str, str]]) -> Path:
    """Make the distribution ``name`` with these entry points visible to what has ``folder`` on its path.

    A distribution of that name elsewhere on the path is hidden by it.
    """
    metadata = folder / f"{name.replace('-', '_')}-0.dist-info"
    stated, points = f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n", ConfigParser()
    points.read_dict(entry_points)
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(stated, encoding="utf-8")
    with open(metadata / "entry_points.txt", "w", encoding="utf-8") as file:
        points.write(file)
    return folder


def our_entry_points() -> dict[str, dict[str, str]]:
    """Those of pyproject.toml: tests do not depend on how, and of what time, we are installed."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]["entry-points"]
