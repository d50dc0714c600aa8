"""Image files in folders, tars and zips; on disk, or wherever fsspec reads.

A *file* is a list: [path], or [archive, offset, size, how] for a part of a tar or zip.
"""

from __future__ import annotations

import contextlib
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
from urllib.parse import unquote

import braceexpand

from otter_openclip.data import tables
from otter_openclip.data.decoding import IMAGE_SUFFIXES
from otter_openclip.shards import read as shard_samples
from otter_openclip.shards.faults import SampleError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ARCHIVES = (".tar", ".zip", *COMPRESSED)
TABLES = (".parquet", ".arrow")  # with the images in them
_RAW, _DEFLATED = -1, zipfile.ZIP_DEFLATED
_LOCAL_HEADER = 30  # of a zip's member
_UTF8 = 1 << 11  # flag: the name's encoding


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
        for path in map(absolute, [text] if remote else named(text)):
            if path.lower().endswith(suffixes) and (remote or os.path.isfile(path)):
                archives.append(path)
            elif remote or os.path.isdir(path):
                folders.append(path)
                found = [] if remote else glob.glob(f"{glob.escape(path)}/{inside}", recursive=True)
                plain = tuple(suffix for suffix in suffixes if suffix not in COMPRESSED)
                archives += (each for each in sorted(found) if each.lower().endswith(plain))
            elif not os.path.exists(path):
                raise FileNotFoundError(f"{path}: no such folder or archive")
            else:
                listed = ", ".join(suffixes)
                raise ValueError(f"{path} is neither a folder nor an archive ({listed})")
    # A link to another of them holds nothing more.
    return folders, list({os.path.realpath(path): path for path in archives}.values())


def named(text: str) -> list[str]:
    """The path ``text``, or those that it matches if there is no such path."""
    return [text] if os.path.lexists(text) else sorted(glob.glob(text)) or [text]


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
    behind = _read_at(path, 8, offset + size).removeprefix(b"PK\x07\x08")
    if zlib.crc32(content).to_bytes(4, "little") not in (header[14:18], behind[:4]):
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
    files = (m for m in members(source) if "/._" not in f"/{m.name}")  # macOS's, beside each
    for name, group in itertools.groupby(files, lambda m: os.path.splitext(m.name)[0]):
        found = [Sample(name)]
        seen: set[str] = set()
        for member in group:
            if member.name in seen:  # another sample begins, as in training
                found.append(Sample(name))
                seen.clear()
            seen.add(member.name)
            suffix = os.path.splitext(member.name)[1].lower()
            if suffix == ".json":
                found[-1] = found[-1]._replace(metadata=read(member.file(source)))
            elif suffix and suffix in IMAGE_SUFFIXES:
                found[-1] = found[-1]._replace(file=member.file(source))
        yield from (sample for sample in found if sample.metadata is not None or sample.file)


def members(source: str) -> Iterator[Member]:
    """The files below a folder, of an uncompressed tar (and of tars inside it, as ImageNet's) or a zip.

    OSError if an archive is damaged, ValueError if it does not allow reading by offset.
    """
    if "://" in source:
        system, folder = tables.remote(source)
        for path in system.find(folder):
            name = os.path.relpath(path, folder)
            name = unquote(name) if source.startswith("http") else name
            yield Member(name, system.unstrip_protocol(path))
    elif os.path.isdir(source):
        seen: set[str] = set()  # links may lead round in circles
        for folder, inner, names in os.walk(source, onerror=_raise, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:
                inner.clear()
                continue
            seen.add(real)
            for name in sorted(names, key=os.path.splitext):
                yield Member(os.path.relpath(os.path.join(folder, name), source))
    else:
        with tables.whole(source):
            zipped = source.lower().endswith(".zip")
            yield from _zip_members(source) if zipped else _tar_members(source)


def _zip_members(path: str) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for entry in (entry for entry in archive.infolist() if not entry.is_dir()):
            how = entry.compress_type
            if how not in (zipfile.ZIP_STORED, _DEFLATED) or entry.flag_bits & 1:
                raise _packed(path, f"{entry.filename} is encrypted or of compression method {how}")
            name = entry.filename
            if not entry.flag_bits & _UTF8:  # macOS writes UTF-8 all the same
                with contextlib.suppress(UnicodeError):
                    name = name.encode("cp437").decode()
            name = name.replace("\\", "/")  # of Windows
            yield Member(name, entry.header_offset, entry.compress_size, how)


def _packed(path: str, fault: str) -> ValueError:
    return ValueError(f"{path}: {fault}; unpack it and give the folder")


def _raise(error: OSError) -> None:
    raise error


def _tar_members(path: str, start: int = 0, *, linked: bool = True) -> Iterator[Member]:
    if not os.path.getsize(path):  # a tar of no bytes holds no files
        return
    links: dict[str, list[str]] = {}
    # tarfile takes the file's position as its start, so offsets are the outer file's throughout.
    with open(path, "rb") as file:
        file.seek(start)
        tar = tarfile.open(fileobj=file, mode="r:", tarinfo=shard_samples.Member)
        for entry in shard_samples.members(tar, last=not start):
            if entry.islnk() or entry.issym():
                beside = os.path.dirname(entry.name) if entry.issym() else ""
                target = os.path.normpath(os.path.join(beside, entry.linkname))
                links.setdefault(target, []).append(entry.name)
            if not entry.isreg():
                continue
            if entry.issparse():
                raise _packed(path, f"{entry.name} is a sparse file")
            if not entry.name.lower().endswith(".tar"):
                yield Member(entry.name, entry.offset_data, entry.size, _RAW)
                continue
            for member in _tar_members(path, entry.offset_data) if entry.size else ():
                if member.place + member.size > entry.offset_data + entry.size:
                    raise tarfile.ReadError(f"{entry.name} inside it is cut short")
                yield member
    if links and linked:  # their files' places, which nothing has kept, are looked for again
        for member in _tar_members(path, start, linked=False):
            for name in links.get(os.path.normpath(member.name), ()):
                yield member._replace(name=name)


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
