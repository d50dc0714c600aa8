"""Writing files whole or not at all: to a temporary name beside them, then renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# A file's path, its bytes as they are and as they shall be; None stands for no such file.
Change = tuple[Path, bytes | None, bytes | None]


@contextlib.contextmanager
def written_whole(
    path: str | os.PathLike[str], mode: str = "wb", *, follow_links: bool = True
) -> Iterator[IO[Any]]:
    """Open a file that takes the place of ``path`` once the block is done and its bytes are on disk.

    If the block raises, ``path`` is as it was and the temporary file is gone; a full disk's error names
    ``path``. A device or pipe (``/dev/stdout``) is written to directly.

    Args:
        path: in a folder that exists.
        mode: "wb", or "w" for UTF-8 text whose line ends stay as they are written.
        follow_links: write where a link points to; otherwise a file takes the link's place.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if os.path.exists(path) and not os.path.isfile(path):
        with _full_disk_named(path), open(path, mode, **text) as file:
            yield file
        return
    path = Path(os.path.realpath(path) if follow_links else path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with _full_disk_named(path), open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


@contextlib.contextmanager
def _full_disk_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """The system's own error of a write says no name, unlike that of opening a file."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            error.filename = str(path)
        raise


def make_room(path: Path) -> None:
    """Make the folder of a file that a long command writes in the end.

    Raises:
        OSError: if the file cannot be written there.
    """
    with contextlib.suppress(FileExistsError, NotADirectoryError):  # a file is in its way
        path.parent.mkdir(parents=True, exist_ok=True)
    device = path.exists() and not path.is_file() and not path.is_dir()
    writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
    if path.is_dir() or not (device or writable):
        raise OSError(f"{path} is a folder, or not in one that can be written to; name another")


def claim(path: Path) -> IO[Any]:
    """Lock the file ``path`` until what is returned is closed or this process ends, however it does.

    Where there are no locks (Windows, some network file systems) nothing is locked.

    Raises:
        FileExistsError: naming the process that holds it.
    """
    file = open(path, "a+", encoding="utf-8")
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a forked child does not hold it
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise FileExistsError(holder) from error
    except (ImportError, OSError):
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 text file."""
    with written_whole(path, "w") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Make a file's contents, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_together(changes: Sequence[Change]) -> None:
    """Make all ``changes``, or none if one of them fails: then the files come back as they were.

    Every file is written in full before the first is renamed into place. None is written through, so
    what a link leads to (uv's cache, for one) keeps its contents. Modes and owners stay. Folders are
    made and, once empty, removed; .pyc files of changed modules go, which may outlive their source.

    Raises:
        OSError: saying what to do, and where the originals are that could not be put back.
    """
    kept: dict[Path, Path] = {}
    try:
        with contextlib.ExitStack() as renames:
            for path, before, after in changes:
                if before is not None:
                    kept[path] = path.with_name(f".{path.name}.{secrets.token_hex(4)}.original")
                    _keep(path, kept[path])
                if after is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    file = renames.enter_context(written_whole(path, follow_links=False))
                    file.write(after)
                    if before is not None:
                        _take_mode(file.name, path)
        for path, _, after in changes:
            if after is None:
                path.unlink()
    except BaseException as error:
        lost = _put_back(changes, kept)
        if not isinstance(error, OSError):
            raise
        state = f"These could not be put back: {', '.join(lost)}" if lost else "No file was changed"
        raise OSError(
            f"cannot write: {error}. {state}. Fix: make the folders writable (are they another user's, "
            "or on a full disk?), or work on a copy"
        ) from error
    finally:
        for copy in kept.values():
            copy.unlink(missing_ok=True)
    for path, _, after in changes:
        if path.suffix == ".py":
            for compiled in path.parent.glob(f"__pycache__/{glob.escape(path.stem)}.*.pyc"):
                with contextlib.suppress(OSError):
                    compiled.unlink()
        if after is None:
            _remove_empty(path)


def _keep(path: Path, copy: Path) -> None:
    """A second name for a file, or a copy where the file system has no hard links."""
    try:
        os.link(path, copy, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(path, copy, follow_symlinks=False)


def _take_mode(file: str, like: Path) -> None:
    shutil.copymode(like, file)
    owner = like.stat()
    with contextlib.suppress(PermissionError):  # only root gives files away
        os.chown(file, owner.st_uid, owner.st_gid)


def _put_back(changes: Sequence[Change], kept: dict[Path, Path]) -> list[str]:
    """Undo ``changes``; names the files where that failed, whose originals stay out of ``kept``."""
    lost = []
    for path, before, _ in changes:
        try:
            if before is None:
                path.unlink(missing_ok=True)
                _remove_empty(path)
            elif path in kept and not (path.exists() and path.read_bytes() == before):
                os.replace(kept[path], path)
        except OSError:
            lost.append(f"{path} (its original is {kept.pop(path)})" if path in kept else str(path))
    return lost


def _remove_empty(path: Path) -> None:
    """Remove the folders around ``path`` as far as they are empty."""
    for folder in path.parents:
        try:
            if (folder / "__pycache__").is_dir():
                (folder / "__pycache__").rmdir()
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            break
