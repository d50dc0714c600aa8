"""Replace several files, all or none."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Change:
    """A file's bytes before and after; None stands for no such file."""

    path: Path
    before: bytes | None
    after: bytes | None


def replace_files(changes: list[Change]) -> None:
    """Make all ``changes``, or none if one of them fails.

    New contents are written in full beside the files first, and renamed into place last, so that no file
    is ever written through: a hard link elsewhere (uv's cache, for one) keeps its contents. Modes and
    owners stay. When one fails, the files replaced before it come back as they were, times and links
    included.
    A directory that is empty after its last file was removed goes too, and so does compiled code.

    Raises:
        OSError: with the path and what to do.
    """
    staged: dict[Path, Path] = {}
    kept: dict[Path, Path] = {}
    made: list[Path] = []
    done: list[Change] = []
    path = Path()
    try:
        for change in changes:
            path = change.path
            if change.after is not None:
                made += _make_folders(path.parent)
                staged[path] = _beside(path)
                _write(staged[path], change.after, like=path if change.before is not None else None)
            if change.before is not None:
                kept[path] = _beside(path)
                _keep(path, kept[path])
        for change in changes:
            path = change.path
            done.append(change)  # before, or an interrupt after the call would be missed
            try:
                if change.after is not None:
                    os.replace(staged[path], path)
                else:
                    path.unlink()
            except OSError:
                done.pop()
                raise
    except BaseException as error:
        lost = _restore(done, kept)
        unneeded = [copy for path, copy in kept.items() if path not in lost]
        for temporary in (*staged.values(), *unneeded):
            temporary.unlink(missing_ok=True)
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if not isinstance(error, OSError):
            raise
        state = "No file was changed"
        if lost:
            state = "These could not be put back: " + ", ".join(
                f"{path} (its original is {copy})" for path, copy in lost.items()
            )
        raise OSError(
            f"cannot write {path}: {error.strerror or error}. {state}. Fix: make {path.parent} writable "
            "(is it another user's environment, or a full disk?), or give --target a copy"
        ) from error
    for copy in kept.values():
        copy.unlink()
    for change in changes:
        _forget_compiled(change.path)
        if change.after is None:
            _remove_empty(change.path.parent)


def _restore(changes: list[Change], kept: dict[Path, Path]) -> dict[Path, Path]:
    """Put everything back; returns the files where that failed, with their kept originals."""
    lost = {}
    for change in changes:
        path = change.path
        try:
            if change.before is None:
                path.unlink(missing_ok=True)
            elif path in kept and kept[path].exists():
                os.replace(kept[path], path)  # does nothing where both are one file still
        except OSError:
            if path in kept:
                lost[path] = kept[path]
    return lost


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.otter-patch")


def _write(path: Path, content: bytes, like: Path | None) -> None:
    """A new file with ``content``, and mode and owner of ``like``."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if like is not None:
        shutil.copymode(like, path)
        if hasattr(os, "chown"):
            owner = like.stat()
            with contextlib.suppress(PermissionError):  # only root gives files away
                os.chown(path, owner.st_uid, owner.st_gid)


def _keep(path: Path, copy: Path) -> None:
    """A second name for a file, or a copy where the file system has no hard links."""
    try:
        os.link(path, copy, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(path, copy, follow_symlinks=False)


def _make_folders(folder: Path) -> list[Path]:
    """Make ``folder`` and its parents; returns those that were not there, outermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        folder.mkdir()
    return missing[::-1]


def _forget_compiled(path: Path) -> None:
    """Remove a module's .pyc files: unchecked ones would outlive any change of their source."""
    if path.suffix == ".py":
        for compiled in (path.parent / "__pycache__").glob(f"{glob.escape(path.stem)}.*.pyc"):
            with contextlib.suppress(OSError):
                compiled.unlink()


def _remove_empty(folder: Path) -> None:
    """Remove ``folder`` and its parents as far as they are empty."""
    with contextlib.suppress(OSError):
        while True:
            with contextlib.suppress(OSError):
                (folder / "__pycache__").rmdir()
            folder.rmdir()
            folder = folder.parent
