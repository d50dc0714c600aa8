"""Image files in folders, tars, zips and tables; on disk or wherever fsspec reads.

A *file* is a list: [path], or [archive, offset, size, how] for a part of a tar or zip.
"""

from __future__ import annotations

import functools
import glob
import io
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import braceexpand
from tqdm import tqdm

from otter_openclip.data import tables
from otter_openclip.data.decoding import UndecodableImageError
from otter_openclip.files import written_whole

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ARCHIVES = (".tar", ".zip", *COMPRESSED)
TABLES = (".parquet", ".arrow")  # with the images in them
_ZSTANDARD = b"\x28\xb5\x2f\xfd"
_RAW, _DEFLATED = -1, zipfile.ZIP_DEFLATED
_LOCAL_HEADER = 30  # of a zip's member
_CRC_LATER = 8  # flag: it stands behind the content


class Member(NamedTuple):
    """One file of an archive; ``how`` is a zip's compression method, or -1 in a tar."""

    name: str
    offset: int
    size: int
    how: int


def expand(
    patterns: Iterable[str], suffixes: tuple[str, ...] = ARCHIVES
) -> tuple[list[str], list[str]]:
    """Split arguments into (folders, archives), absolute or addresses; braces and wildcards expanded.

    A folder that holds archives stands for them too; compressed tars, which take long to unpack and
    much room, are used only if named.

    Raises:
        FileNotFoundError: if one of them is not there.
        ValueError: if a file is not an archive.
    """
    folders, archives = [], []
    for text in (text for pattern in patterns for text in braceexpand.braceexpand(str(pattern))):
        remote = "://" in text
        for path in map(absolute, [text] if remote else sorted(glob.glob(text)) or [text]):
            if path.endswith(suffixes) and (remote or os.path.isfile(path)):
                archives.append(path)
            elif remote or os.path.isdir(path):
                folders.append(path)
                inside = [] if remote else sorted(glob.glob(f"{glob.escape(path)}/*"))
                plain = (each for each in inside if not each.endswith(COMPRESSED))
                archives += (each for each in plain if each.endswith(suffixes))
            elif not os.path.exists(path):
                raise FileNotFoundError(f"{path}: no such folder or archive")
            else:
                fault = f"neither a folder nor an archive ({', '.join(suffixes)})"
                raise ValueError(f"{path} is {fault}")
    return folders, list(dict.fromkeys(archives))


def read(file: Sequence[Any]) -> bytes:
    """The bytes of a file.

    Raises:
        FileNotFoundError: if there is none.
        UndecodableImageError: if the archive is shorter than its index says or a zip member is damaged.
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
        raise UndecodableImageError(f"damaged zip member: {error}") from error
    (flags,), (crc,) = struct.unpack_from("<H", header, 6), struct.unpack_from("<I", header, 14)
    if not flags & _CRC_LATER and zlib.crc32(content) != crc:
        raise UndecodableImageError("damaged zip member: its CRC-32 is another")
    return content


def _read_at(path: str, size: int, offset: int) -> bytes:
    content = os.pread(_opened(path).fileno(), size, offset)
    if len(content) != size:
        raise UndecodableImageError(f"its archive ends after {len(content)} of {size} bytes")
    return content


@functools.lru_cache(maxsize=64)
def _opened(path: str) -> BinaryIO:
    return open(path, "rb")  # closed when it falls out of the cache


def members(path: str) -> Iterator[Member]:
    """The files of an uncompressed tar (tars inside it included, as ImageNet's) or a zip.

    Raises:
        OSError: if it is damaged or compressed in a way that does not allow reading by offset.
    """
    try:
        if not path.endswith(".zip"):
            with open(path, "rb") as file:
                if os.path.getsize(path):  # a tar of no bytes holds no files
                    yield from _tar_members(file)
            return
        with zipfile.ZipFile(path) as archive:
            for entry in (entry for entry in archive.infolist() if not entry.is_dir()):
                how = entry.compress_type
                if how not in (zipfile.ZIP_STORED, _DEFLATED) or entry.flag_bits & 1:
                    fault = f"{entry.filename} is encrypted or compressed with method {how}"
                    raise OSError(f"{path}: {fault}; unpack the zip and give the folder")
                name = entry.filename.replace("\\", "/")  # of Windows
                yield Member(name, entry.header_offset, entry.compress_size, how)
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        fault = f"damaged or cut short ({error})"
        raise OSError(f"{path}: {fault}; download or write it again") from error


def _tar_members(file: BinaryIO) -> Iterator[Member]:
    # tarfile takes the file's position as its start, so offsets are the outer file's throughout.
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (entry := tar.next()) is not None:
            tar.members.clear()  # or it keeps all
            if entry.isreg() and entry.name.endswith(".tar"):
                file.seek(entry.offset_data)
                for member in _tar_members(file):
                    if member.offset + member.size > entry.offset_data + entry.size:
                        raise tarfile.ReadError(f"{entry.name} inside it is cut short")
                    yield member
            elif entry.isreg():
                yield Member(entry.name, entry.offset_data, entry.size, _RAW)
        # tarfile takes a header cut short or garbled for the end.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")


def local(archive: str, folder: Path) -> str:
    """``archive``, or what can be read by offset made of it in ``folder``: fetched, unpacked, a tar.

    Raises:
        OSError: if it is damaged or its compression is unknown.
    """
    remote, table = "://" in archive, archive.endswith(TABLES)
    with tables.open_bytes(archive) as file:
        unpack = tables.opener(file)
        if file.peek(4).startswith(_ZSTANDARD):  # type: ignore[attr-defined]
            raise OSError(f"{archive}: Zstandard; decompress it (unzstd) and give the .tar")
        if not (unpack or remote or table):
            return archive
        folder.mkdir(parents=True, exist_ok=True)
        name, suffix = os.path.basename(archive), ".zip" if archive.endswith(".zip") else ".tar"
        target = folder / (digest(f"{archive} {stamp(archive)}").hex() + suffix)
        if target.exists():
            return str(target)
        with tables.damage_named(archive), written_whole(target) as out:
            if table:
                from otter_openclip.data.columnar import write_tar

                write_tar(file, out, archive)
            else:
                size = None if remote else os.path.getsize(archive)
                with tqdm.wrapattr(file, "read", size, desc=f"Unpacking {name}") as packed:
                    shutil.copyfileobj(unpack(packed) if unpack else packed, out, 1 << 20)
        return str(target)


def add_sample(tar: tarfile.TarFile, key: str, parts: dict[str, bytes]) -> None:
    """Write a sample as webdataset's TarWriter does, which takes torch, 2 s and 600 MB, to import."""
    for suffix, content in sorted(parts.items()):
        member = tarfile.TarInfo(f"{key}.{suffix}")  # no owner, no date: the same bytes every time
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def absolute(path: str) -> str:
    """An absolute path, so that a resume from another folder is the same command, or an address."""
    return path if "://" in path else os.path.abspath(path)


def stamp(path: str) -> list[Any]:
    """What changes when a file does: its size and its date or tag."""
    if "://" not in path:
        return [os.stat(path).st_size, os.stat(path).st_mtime_ns]
    import fsspec

    system, name = fsspec.core.url_to_fs(path)
    info = system.info(name)
    return [info.get("size"), str(info.get("ETag") or info.get("mtime") or info.get("created"))]


def digest(text: str) -> bytes:
    """8 bytes that stand for a text."""
    return blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
