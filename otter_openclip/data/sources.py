"""Image files in folders, tars and zips."""

from __future__ import annotations

import functools
import glob
import itertools
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from otter_openclip.data import tables
from otter_openclip.files import written_whole
from otter_openclip.shards import read as shard_samples
from otter_openclip.shards.read import SampleError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_PLAIN = (".tar", ".zip")
_DEFLATED = zipfile.ZIP_DEFLATED
_LOCAL_HEADER = 30  # bytes before the name of a zip's member


class File(NamedTuple):
    """Where a file's bytes are: all of ``path``, or what an archive has at ``offset``.

    ``method`` is a zip's compression method and ``crc`` its checksum, both None in a tar.
    """

    path: str
    offset: int | None = None
    size: int | None = None
    method: int | None = None
    crc: int | None = None


def expand(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split paths into (folders, archives).

    A folder stands for the archives in it too; but compressed tars, which take long to unpack and much
    room, are used only if named. FileNotFoundError if one of the paths is not there, ValueError if it is
    a file but no archive.
    """
    folders, archives = [], []
    for path in paths:
        if os.path.isdir(path):
            folders.append(path)
            files = sorted(glob.glob(f"{glob.escape(path)}/*"))
            archives += (file for file in files if file.lower().endswith(_PLAIN))
        elif not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such folder or archive")
        elif path.lower().endswith((*_PLAIN, *COMPRESSED)):
            archives.append(path)
        else:
            listed = ", ".join((*_PLAIN, *COMPRESSED))
            raise ValueError(f"{path} is neither a folder nor an archive ({listed})")
    return folders, list(dict.fromkeys(archives))


def unpacked(archive: str, folder: Path) -> str:
    """``archive``, or if it is compressed the file in ``folder`` that it is unpacked to.

    OSError if it is damaged.
    """
    with open(archive, "rb") as packed:
        unpack = tables.opener(packed)
        if unpack is None:
            return archive
        folder.mkdir(parents=True, exist_ok=True)
        key = digest(f"{archive} {stamp(archive)}").hex()
        target = folder / f"{key}-{os.path.basename(archive)}"  # the name is in errors
        if not target.exists():
            size, title = os.path.getsize(archive), f"Unpacking {os.path.basename(archive)}"
            bar = tqdm.wrapattr(packed, "read", size, desc=title)
            with written_whole(target) as out, tables.damage_named(archive), bar as watched:
                shutil.copyfileobj(unpack(watched), out, 1 << 20)
        return str(target)


def read(file: File) -> bytes:
    """The bytes of a file; FileNotFoundError if there is none.

    SampleError if the archive is shorter than its index says or a zip's member is damaged.
    """
    if file.offset is None:
        try:
            with open(file.path, "rb") as opened:
                return opened.read()
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(file.path) from error
    if file.method is None:
        return _read_at(file.path, file.size, file.offset)
    header = _read_at(file.path, _LOCAL_HEADER, file.offset)
    offset = file.offset + _LOCAL_HEADER + sum(struct.unpack_from("<HH", header, 26))
    content = _read_at(file.path, file.size, offset)
    try:
        if file.method == _DEFLATED:
            content = zlib.decompress(content, -zlib.MAX_WBITS)
    except zlib.error as error:
        raise SampleError(f"damaged zip member: {error}") from error
    if zlib.crc32(content) != file.crc:
        raise SampleError("damaged zip member: its CRC-32 is another")
    return content


def _read_at(path: str, size: int, offset: int) -> bytes:
    archive = _opened(path)  # a thread that holds it keeps it open
    content = os.pread(archive.fileno(), size, offset)
    if len(content) != size:
        raise SampleError(f"its archive ends after {len(content)} of {size} bytes")
    return content


@functools.lru_cache(maxsize=64)
def _opened(path: str) -> BinaryIO:
    return open(path, "rb")  # closed when it has left the cache and nobody holds it


def samples(source: str) -> Iterator[tuple[str, dict[str, File]]]:
    """(name without suffix, suffix -> file) of the samples of a folder or archive, in order.

    A suffix that comes again begins another sample, as in training.
    """
    for stem, group in itertools.groupby(members(source), lambda m: os.path.splitext(m[0])[0]):
        files: dict[str, File] = {}
        for name, file in group:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in files:
                yield stem, files
                files = {}
            files[suffix] = file
        yield stem, files


def members(source: str) -> Iterator[tuple[str, File]]:
    """(name, file) of all below a folder, in an uncompressed tar and the tars inside it, or in a zip.

    OSError if an archive is damaged, ValueError if it does not allow reading by offset.
    """
    if os.path.isdir(source):
        for folder, _, names in os.walk(source, onerror=_raise):
            for name in sorted(names, key=os.path.splitext):
                path = os.path.join(folder, name)
                yield os.path.relpath(path, source), File(path)
    else:
        with tables.damage_named(source):
            zipped = source.lower().endswith(".zip")
            yield from _zip_members(source) if zipped else _tar_members(source)


def _raise(error: OSError) -> None:
    raise error


def _zip_members(path: str) -> Iterator[tuple[str, File]]:
    with zipfile.ZipFile(path) as archive:
        for entry in (entry for entry in archive.infolist() if not entry.is_dir()):
            method = entry.compress_type
            if method not in (zipfile.ZIP_STORED, _DEFLATED) or entry.flag_bits & 1:
                fault = f"{entry.filename} is encrypted or of compression method {method}"
                raise ValueError(f"{path}: {fault}; unpack it and give the folder")
            place = File(path, entry.header_offset, entry.compress_size, method, entry.CRC)
            yield entry.filename, place


def _tar_members(path: str, start: int = 0) -> Iterator[tuple[str, File]]:
    if not os.path.getsize(path):  # a tar of no bytes holds no files
        return
    # tarfile takes the file's position as its start, so offsets are the outer file's throughout.
    with open(path, "rb") as opened:
        opened.seek(start)
        tar = tarfile.open(fileobj=opened, mode="r:", tarinfo=shard_samples.Member)
        for entry in shard_samples.members(tar):
            if not entry.isreg() or entry.issparse():  # links, and files with holes, have no bytes
                continue
            if not entry.name.lower().endswith(".tar"):
                yield entry.name, File(path, entry.offset_data, entry.size)
                continue
            for name, file in _tar_members(path, entry.offset_data) if entry.size else ():
                if file.offset + file.size > entry.offset_data + entry.size:
                    raise tarfile.ReadError(f"{entry.name} inside it is cut short")
                yield name, file


def absolute(path: str) -> str:
    """An absolute path, so that a resume from another folder is the same command; "" stays empty."""
    return path and os.path.abspath(path)


# How arguments are parsed that take several paths.
PATHS: dict[str, Any] = {"action": "extend", "nargs": "+", "type": absolute, "metavar": "PATH"}


def stamp(path: str) -> list[Any]:
    """What changes when a file does: its size and its date."""
    return [os.stat(path).st_size, os.stat(path).st_mtime_ns]


def digest(text: str) -> bytes:
    """8 bytes that stand for a text."""
    return blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
