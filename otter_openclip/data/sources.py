"""Image files in folders, tars and zips; on disk, or wherever fsspec reads.

A *file* is a list: [path], or [archive, offset, size, how] for a part of a tar or zip.
"""

from __future__ import annotations

import functools
import glob
import itertools
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any, BinaryIO, NamedTuple

import braceexpand

from otter_openclip.data import tables
from otter_openclip.data.decoding import IMAGE_SUFFIXES
from otter_openclip.evaluation import shard_samples
from otter_openclip.evaluation.faults import SampleError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ARCHIVES = (".tar", ".zip", *COMPRESSED)
TABLES = (".parquet", ".arrow")  # with the images in them
_RAW, _DEFLATED = -1, zipfile.ZIP_DEFLATED
_LOCAL_HEADER = 30  # of a zip's member
_CRC_LATER = 8  # flag: it stands behind the content


class Member(NamedTuple):
    """A file of a folder or archive.

    ``place`` is the offset in an archive, and ``how`` a zip's compression method, or -1 in a tar. In a
    folder there is only a place, and that only where it is not the folder's path and the name.
    """

    name: str
    place: int | str | None = None
    size: int | None = None
    how: int | None = None

    def file(self, source: str) -> list[Any]:
        """The file that this is in ``source``."""
        if self.how is None:
            return [self.place or f"{source}/{self.name}"]
        return [source, self.place, self.size, self.how]


class Sample(NamedTuple):
    """An image's file with the JSON of the same name, each None if it is not there."""

    name: str
    metadata: bytes | None = None
    file: list[Any] | None = None


def expand(
    patterns: Iterable[str], suffixes: tuple[str, ...] = ARCHIVES, inside: str = "*"
) -> tuple[list[str], list[str]]:
    """Split paths into (folders, archives), absolute or addresses; braces and wildcards expanded.

    A folder stands for the archives ``inside`` it too; but compressed tars, which take long to unpack
    and much room, are used only if named. FileNotFoundError if one of the paths is not there,
    ValueError if it is a file but no archive.
    """
    folders, archives = [], []
    for text in (text for pattern in patterns for text in braceexpand.braceexpand(pattern)):
        remote = "://" in text
        for path in map(absolute, [text] if remote else sorted(glob.glob(text)) or [text]):
            if path.endswith(suffixes) and (remote or os.path.isfile(path)):
                archives.append(path)
            elif remote or os.path.isdir(path):
                folders.append(path)
                found = [] if remote else glob.glob(f"{glob.escape(path)}/{inside}", recursive=True)
                plain = (each for each in sorted(found) if not each.endswith(COMPRESSED))
                archives += (each for each in plain if each.endswith(suffixes))
            elif not os.path.exists(path):
                raise FileNotFoundError(f"{path}: no such folder or archive")
            else:
                listed = ", ".join(suffixes)
                raise ValueError(f"{path} is neither a folder nor an archive ({listed})")
    return folders, list(dict.fromkeys(archives))


def read(file: Sequence[Any]) -> bytes:
    """The bytes of a file; FileNotFoundError if there is none.

    SampleError if the archive is shorter than its index says or a zip's member is damaged.
    """
    path, *part = file
    if not part:
        try:
            with tables.open_bytes(path) as opened:
                return opened.read()
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(path) from error
    offset, size, how = part
    return _read_at(path, size, offset) if how == _RAW else _unzipped(path, offset, size, how)


def _unzipped(path: str, offset: int, size: int, how: int) -> bytes:
    header = _read_at(path, _LOCAL_HEADER, offset)
    offset += _LOCAL_HEADER + sum(struct.unpack_from("<HH", header, 26))  # name, extra field
    content = _read_at(path, size, offset)
    try:
        content = zlib.decompress(content, -zlib.MAX_WBITS) if how == _DEFLATED else content
    except zlib.error as error:
        raise SampleError(f"damaged zip member: {error}") from error
    (flags,), (crc,) = struct.unpack_from("<H", header, 6), struct.unpack_from("<I", header, 14)
    if not flags & _CRC_LATER and zlib.crc32(content) != crc:
        raise SampleError("damaged zip member: its CRC-32 is another")
    return content


def _read_at(path: str, size: int, offset: int) -> bytes:
    content = os.pread(_opened(path).fileno(), size, offset)
    if len(content) != size:
        raise SampleError(f"its archive ends after {len(content)} of {size} bytes")
    return content


@functools.lru_cache(maxsize=64)
def _opened(path: str) -> BinaryIO:
    return open(path, "rb")  # closed when it falls out of the cache


def samples(source: str) -> Iterator[Sample]:
    """The images and JSON files of a folder or archive by their names without suffix, in order."""
    for name, group in itertools.groupby(members(source), lambda m: os.path.splitext(m.name)[0]):
        metadata = file = None
        for member in group:
            suffix = os.path.splitext(member.name)[1].lower()
            if suffix == ".json":
                metadata = read(member.file(source))
            elif suffix and suffix in IMAGE_SUFFIXES:
                file = member.file(source)
        if metadata is not None or file is not None:
            yield Sample(name, metadata, file)


def members(source: str) -> Iterator[Member]:
    """The files below a folder, of an uncompressed tar (and of tars inside it, as ImageNet's) or a zip.

    OSError if an archive is damaged or compressed in a way that does not allow reading by offset.
    """
    if "://" in source:
        system, folder = tables.remote(source)
        for path in system.find(folder):
            yield Member(os.path.relpath(path, folder), system.unstrip_protocol(path))
    elif os.path.isdir(source):
        for folder, _, names in os.walk(source):
            for name in sorted(names, key=os.path.splitext):
                yield Member(os.path.relpath(os.path.join(folder, name), source))
    else:
        with tables.whole(source):
            yield from _zip_members(source) if source.endswith(".zip") else _tar_members(source)


def _zip_members(path: str) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for entry in (entry for entry in archive.infolist() if not entry.is_dir()):
            how = entry.compress_type
            if how not in (zipfile.ZIP_STORED, _DEFLATED) or entry.flag_bits & 1:
                fault = f"{entry.filename} is encrypted or compressed with method {how}"
                raise OSError(f"{path}: {fault}; unpack the zip and give the folder")
            name = entry.filename.replace("\\", "/")  # of Windows
            yield Member(name, entry.header_offset, entry.compress_size, how)


def _tar_members(path: str, start: int = 0) -> Iterator[Member]:
    if not os.path.getsize(path):  # a tar of no bytes holds no files
        return
    # tarfile takes the file's position as its start, so offsets are the outer file's throughout.
    with open(path, "rb") as file:
        file.seek(start)
        tar = tarfile.open(fileobj=file, mode="r:", tarinfo=shard_samples.Member)
        for entry in (entry for entry in shard_samples.members(tar) if entry.isreg()):
            if not entry.name.endswith(".tar"):
                yield Member(entry.name, entry.offset_data, entry.size, _RAW)
                continue
            for member in _tar_members(path, entry.offset_data):
                if member.place + member.size > entry.offset_data + entry.size:
                    raise tarfile.ReadError(f"{entry.name} inside it is cut short")
                yield member


def absolute(path: str) -> str:
    """An absolute path, so that a resume from another folder is the same command, or an address."""
    return path if not path or "://" in path else os.path.abspath(path)


def stamp(path: str) -> list[Any]:
    """What changes when a file does: its size and its date or tag."""
    if "://" not in path:
        return [os.stat(path).st_size, os.stat(path).st_mtime_ns]
    system, name = tables.remote(path)
    info = system.info(name)
    return [info.get("size"), str(info.get("ETag") or info.get("mtime") or info.get("created"))]


def digest(text: str) -> bytes:
    """8 bytes that stand for a text."""
    return blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
