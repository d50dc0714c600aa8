"""Image files in folders, tars and zips; on disk, or wherever fsspec reads."""

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
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote

import braceexpand

from otter_openclip.data import tables
from otter_openclip.data.decoding import IMAGE_SUFFIXES
from otter_openclip.shards import read as shard_samples
from otter_openclip.shards.read import SampleError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ARCHIVES = (".tar", ".zip", *COMPRESSED)
TABLES = (".parquet", ".arrow")  # with the images in them
_RAW, _DEFLATED = -1, zipfile.ZIP_DEFLATED
_LOCAL_HEADER = 30  # of a zip's member
_UTF8 = 1 << 11  # flag: the name's encoding


class File(NamedTuple):
    """Where a file's bytes are: all of ``path``, or what an archive has at ``offset``.

    ``how`` is a zip's compression method, or -1 in a tar.
    """

    path: str
    offset: int | None = None
    size: int | None = None
    how: int | None = None


class Sample(NamedTuple):
    """An image's file with the JSON of the same name, each None if it is not there."""

    name: str
    metadata: bytes | None = None
    file: File | None = None


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
                files = [] if remote else glob.glob(f"{glob.escape(path)}/{inside}", recursive=True)
                plain = tuple(suffix for suffix in suffixes if suffix not in COMPRESSED)
                archives += (file for file in sorted(files) if file.lower().endswith(plain))
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


def read(file: File) -> bytes:
    """The bytes of a file; FileNotFoundError if there is none.

    SampleError if the archive is shorter than its index says or a zip's member is damaged.
    """
    if file.offset is None:
        try:
            with tables.open_bytes(file.path) as opened:
                return opened.read()
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(file.path) from error
    if file.how == _RAW:
        return _read_at(file.path, file.size, file.offset)
    header = _read_at(file.path, _LOCAL_HEADER, file.offset)
    offset = file.offset + _LOCAL_HEADER + sum(struct.unpack_from("<HH", header, 26))
    content = _read_at(file.path, file.size, offset)
    try:
        content = zlib.decompress(content, -zlib.MAX_WBITS) if file.how == _DEFLATED else content
    except zlib.error as error:
        raise SampleError(f"damaged zip member: {error}") from error
    behind = _read_at(file.path, 8, offset + file.size).removeprefix(b"PK\x07\x08")
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
    files = (m for m in members(source) if "/._" not in f"/{m[0]}")  # macOS's, beside each
    for stem, group in itertools.groupby(files, lambda member: os.path.splitext(member[0])[0]):
        sample, seen = Sample(stem), set()
        for name, file in group:
            if name in seen:  # another sample begins, as in training
                yield sample
                sample, seen = Sample(stem), set()
            seen.add(name)
            suffix = os.path.splitext(name)[1].lower()
            if suffix == ".json":
                sample = sample._replace(metadata=read(file))
            elif suffix and suffix in IMAGE_SUFFIXES:
                sample = sample._replace(file=file)
        yield sample


def members(source: str) -> Iterator[tuple[str, File]]:
    """(name, file) of all below a folder, in an uncompressed tar and the tars inside it, or in a zip.

    OSError if an archive is damaged, ValueError if it does not allow reading by offset.
    """
    if "://" in source:
        system, folder = tables.remote(source)
        for path in system.find(folder):
            name = os.path.relpath(path, folder)
            address = system.unstrip_protocol(path)
            yield unquote(name) if source.startswith("http") else name, File(address)
    elif os.path.isdir(source):
        seen: set[str] = set()  # links may lead round in circles
        for folder, inner, names in os.walk(source, onerror=_raise, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:
                inner.clear()
                continue
            seen.add(real)
            for path in (
                os.path.join(folder, name) for name in sorted(names, key=os.path.splitext)
            ):
                yield os.path.relpath(path, source), File(path)
    else:
        with tables.whole(source):
            zipped = source.lower().endswith(".zip")
            yield from _zip_members(source) if zipped else _tar_members(source)


def _raise(error: OSError) -> None:
    raise error


def _zip_members(path: str) -> Iterator[tuple[str, File]]:
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
            yield name, File(path, entry.header_offset, entry.compress_size, how)


def _packed(path: str, fault: str) -> ValueError:
    return ValueError(f"{path}: {fault}; unpack it and give the folder")


def _tar_members(path: str, start: int = 0, *, linked: bool = True) -> Iterator[tuple[str, File]]:
    if not os.path.getsize(path):  # a tar of no bytes holds no files
        return
    links: dict[str, list[str]] = {}
    # tarfile takes the file's position as its start, so offsets are the outer file's throughout.
    with open(path, "rb") as opened:
        opened.seek(start)
        tar = tarfile.open(fileobj=opened, mode="r:", tarinfo=shard_samples.Member)
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
                yield entry.name, File(path, entry.offset_data, entry.size, _RAW)
                continue
            for name, file in _tar_members(path, entry.offset_data) if entry.size else ():
                if file.offset + file.size > entry.offset_data + entry.size:
                    raise tarfile.ReadError(f"{entry.name} inside it is cut short")
                yield name, file
    if links and linked:  # nothing has kept where their files are, so they are looked for again
        for target, file in _tar_members(path, start, linked=False):
            for name in links.get(os.path.normpath(target), ()):
                yield name, file


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
