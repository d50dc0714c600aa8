"""Writing files whole or not at all: to a temporary name beside them, then renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that takes the place of ``path`` once the block is done and its bytes are on disk.

    If the block raises, ``path`` is as it was and the temporary file is gone; a full disk's error names
    ``path``. Of several that write at once the last to end wins. A link is followed, and a device or
    pipe (``/dev/stdout``) is written to directly.

    Args:
        path: in a folder that exists.
        mode: "wb", or "w" for UTF-8 text whose line ends stay as they are written.
    """
    # File names that are not of the locale's encoding come out as they went in.
    utf8 = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    text = {} if "b" in mode else utf8
    if os.path.exists(path) and not os.path.isfile(path):
        with _full_disk_named(path), open(path, mode, **text) as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    _remove_unfinished(path)
    writer = f"{socket.gethostname()}-{os.getpid()}"
    temporary = path.with_name(f"{path.name}.{writer}-{secrets.token_hex(4)}.tmp")
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


def _remove_unfinished(path: Path) -> None:
    """Remove what processes of this machine left that were killed while they wrote ``path``."""
    ours = re.escape(f"{path.name}.{socket.gethostname()}-") + r"(\d+)-[0-9a-f]{8}\.tmp"
    for file in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        try:
            if written := re.fullmatch(ours, file.name):
                os.kill(int(written[1]), 0)
        except ProcessLookupError:
            file.unlink(missing_ok=True)
        except PermissionError:
            pass  # It is alive, and another user's.


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


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 text file."""
    with written_whole(path, "w") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def sync(path: Path) -> None:
    """Make a file's contents, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
