"""Where image files are: folders, tars, zips, and what img2dataset wrote.

A *locator* says where one image's bytes are, in JSON: a list of strings is a file, under the first of
these paths that exists; a list of four integers is (archive, offset, size, how) inside an archive of the
build's list. Archives are read by offset, so any worker can read any image.
"""

from __future__ import annotations

import bz2
import functools
import glob
import gzip
import json
import lzma
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import braceexpand
import numpy as np
from tqdm import tqdm

from otter_openclip.data.decoding import UndecodableImageError
from otter_openclip.data.pool import parallel_map
from otter_openclip.data.tables import DAMAGED
from otter_openclip.files import written_whole

Locator = list[str] | list[int]

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", "")
)
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_ZSTANDARD = b"\x28\xb5\x2f\xfd"
_RAW, _ZIP_STORED, _ZIP_DEFLATED = range(3)
_ZIP_LOCAL_HEADER = 30


class Member(NamedTuple):
    """One file of an archive; ``how`` says how its bytes are stored."""

    name: str
    offset: int
    size: int
    how: int


def expand(paths: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """Split arguments into folders and archives.

    Braces and wildcards are expanded, and a folder that holds tars or zips stands for them too.
    Compressed tars take long to unpack and much room, so they are used only if named.

    Returns:
        (folders that hold images or folders, archives), absolute, a folder's archives sorted by name.

    Raises:
        FileNotFoundError: if one of them is not there.
        ValueError: if a file is not an archive.
    """
    folders, archives = [], []
    for pattern in paths:
        for text in braceexpand.braceexpand(str(pattern)):
            found = sorted(glob.glob(text)) if glob.has_magic(text) else [text]
            if not found:
                raise FileNotFoundError(f"nothing matches {text}")
            for name in found:
                path = Path(os.path.abspath(name))
                if path.is_dir():
                    with os.scandir(path) as entries:
                        if any(_may_hold_images(entry) for entry in entries):
                            folders.append(path)
                    archives += sorted(
                        p for p in path.iterdir() if p.suffix in (".tar", ".zip") and p.is_file()
                    )
                elif not path.exists():
                    raise FileNotFoundError(f"{path}: no such folder or archive")
                elif is_archive(path):
                    archives.append(path)
                else:
                    raise ValueError(
                        f"{path} is neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)})"
                    )
    return folders, list(dict.fromkeys(archives))


def _may_hold_images(entry: os.DirEntry[str]) -> bool:
    return os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES or entry.is_dir()


def is_archive(path: Path) -> bool:
    """Whether the name is a tar's or zip's and it is a file."""
    return path.name.endswith(ARCHIVE_SUFFIXES) and path.is_file()


def read(locator: Locator, archives: Sequence[str]) -> bytes:
    """The bytes at ``locator``.

    Raises:
        FileNotFoundError: if none of a file's paths exists.
        UndecodableImageError: if the archive is shorter than its index says or a zip member is damaged.
    """
    if isinstance(locator[0], str):
        for path in locator:
            try:
                with open(path, "rb") as file:
                    return file.read()
            except (FileNotFoundError, NotADirectoryError):
                continue
        raise FileNotFoundError(str(locator[0]))
    archive, offset, size, how = locator
    descriptor = _archive_file(archives[archive]).fileno()
    if how != _RAW:
        header = _pread(descriptor, _ZIP_LOCAL_HEADER, offset)
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        offset += _ZIP_LOCAL_HEADER + name_length + extra_length
    content = _pread(descriptor, size, offset)
    if how != _ZIP_DEFLATED:
        return content
    try:
        return zlib.decompress(content, -zlib.MAX_WBITS)
    except zlib.error as error:
        raise UndecodableImageError(f"damaged zip member: {error}") from error


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    content = os.pread(descriptor, size, offset)
    if len(content) != size:
        raise UndecodableImageError(f"its archive ends after {len(content)} of {size} bytes")
    return content


@functools.lru_cache(maxsize=64)
def _archive_file(path: str) -> BinaryIO:
    return open(path, "rb")  # closed when it falls out of the cache


def members(path: Path) -> Iterator[Member]:
    """The files of an uncompressed tar (tars inside it included, as ImageNet's) or a zip.

    Raises:
        OSError: if it is damaged or compressed in a way that does not allow reading by offset.
    """
    if path.name.endswith(".zip"):
        yield from _zip_members(path)
        return
    with open(path, "rb") as file:
        if not file.read(1):
            return  # a tar of no bytes holds no files; whoever needs them reports them missing
        file.seek(0)
        try:
            yield from _tar_members(file)
        except tarfile.TarError as error:
            raise OSError(
                f"{path}: damaged or cut short ({error}); download or write it again"
            ) from error


def _tar_members(file: BinaryIO) -> Iterator[Member]:
    # tarfile takes the file's position as its start, so offsets are the outer file's throughout.
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (entry := tar.next()) is not None:
            tar.members.clear()  # or it keeps all
            if not entry.isreg():
                continue
            if entry.name.endswith(".tar"):
                file.seek(entry.offset_data)
                for member in _tar_members(file):
                    if member.offset + member.size > entry.offset_data + entry.size:
                        raise tarfile.ReadError(f"{entry.name} inside it is cut short")
                    yield member
            else:
                yield Member(entry.name, entry.offset_data, entry.size, _RAW)
        # tarfile takes a header cut short or garbled for the end.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")


def _zip_members(path: Path) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise OSError(f"{path}: damaged or cut short ({error}); download it again") from error
    how = {zipfile.ZIP_STORED: _ZIP_STORED, zipfile.ZIP_DEFLATED: _ZIP_DEFLATED}
    for entry in entries:
        if entry.is_dir():
            continue
        if entry.compress_type not in how or entry.flag_bits & 1:
            raise OSError(
                f"{path}: {entry.filename} is encrypted or compressed with method "
                f"{entry.compress_type}; unpack the zip and give the folder"
            )
        yield Member(
            entry.filename, entry.header_offset, entry.compress_size, how[entry.compress_type]
        )


def unpacked(archives: Sequence[Path], folder: Path) -> list[Path]:
    """The archives with compressed tars replaced by tars in ``folder`` that can be read by offset.

    Needs the room of the uncompressed tars there.

    Raises:
        OSError: if one is damaged or its compression is unknown.
    """
    result = []
    for number, path in enumerate(archives):
        with open(path, "rb") as file:
            magic = file.read(6)
        if magic.startswith(_ZSTANDARD):
            raise OSError(f"{path}: Zstandard; decompress it (unzstd) and give the .tar")
        opener = next((opener for m, opener in _OPENERS.items() if magic.startswith(m)), None)
        if opener is None:
            result.append(path)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{number}-{path.name.split('.')[0]}.tar"
        if not target.exists():
            with (
                tqdm.wrapattr(
                    open(path, "rb"), "read", path.stat().st_size, desc=f"Unpacking {path.name}"
                ) as packed,
                written_whole(target) as out,
            ):
                try:
                    with opener(packed) as plain:
                        shutil.copyfileobj(plain, out, 1 << 20)
                except DAMAGED as error:
                    raise OSError(
                        f"{path}: damaged or cut short ({error}); download it again"
                    ) from error
        result.append(target)
    return result


def digest(text: str) -> int:
    """A 64-bit hash that is the same in every process; strings of millions of images do not fit."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


class Index:
    """Finds images by name in archives of any number of members, at 48 bytes a member.

    Of several images with one name the first counts, in the order of the archives.
    """

    def __init__(self, parts: Iterable[np.ndarray]) -> None:
        rows = [part for part in parts if len(part)]
        table = np.concatenate(rows) if rows else np.zeros((0, 5), np.uint64)
        self.table = table[np.argsort(table[:, 0], kind="stable")]
        self.names = np.ascontiguousarray(self.table[:, 0])

    def __len__(self) -> int:
        return len(self.names)

    def find(self, name: str) -> list[int] | None:
        """The locator of the image called ``name``, or None."""
        key = np.uint64(digest(name))
        row = int(np.searchsorted(self.names, key))
        if row == len(self.names) or self.names[row] != key:
            return None
        return [int(value) for value in self.table[row, 1:]]


def index_archives(
    archives: Sequence[Path],
    names: Callable[[Path, Iterable[Member]], Iterator[tuple[str, Member]]],
    workers: int,
    wanted: Iterable[str] | None = None,
) -> Index:
    """Index the images of ``archives`` under the names that ``names`` gives them.

    Args:
        archives: uncompressed tars and zips; their order gives the locators' first number.
        names: from an archive and its members to (name, member of the image); a module's function.
        workers: processes that read the archives.
        wanted: names to keep, if not all; ImageNet's tars hold 300 times what is needed.
    """
    digests = None if wanted is None else np.fromiter(map(digest, wanted), np.uint64)
    jobs = [(number, path, names, digests) for number, path in enumerate(archives)]
    parts = parallel_map(_index_one, jobs, workers)
    return Index(tqdm(parts, "Indexing archives", len(jobs), unit="archive", disable=not jobs))


def _index_one(job: tuple[int, Path, Callable, np.ndarray | None]) -> np.ndarray:
    number, path, names, digests = job
    flat = array("Q")
    for name, member in names(path, members(path)):
        flat.extend((digest(name), number, member.offset, member.size, member.how))
    table = np.frombuffer(flat, np.uint64).reshape(-1, 5)
    return table if digests is None else table[np.isin(table[:, 0], digests)]


def by_stem(path: Path, entries: Iterable[Member]) -> Iterator[tuple[str, Member]]:
    """Name images by their file name without folders and suffix."""
    del path
    for member in entries:
        name = PurePosixPath(member.name)
        if name.suffix.lower() in IMAGE_SUFFIXES and not name.name.startswith("."):
            yield name.stem, member


def by_file_name(path: Path, entries: Iterable[Member]) -> Iterator[tuple[str, Member]]:
    """Name images by their file name without folders."""
    del path
    for member in entries:
        name = PurePosixPath(member.name)
        if name.suffix.lower() in IMAGE_SUFFIXES and not name.name.startswith("."):
            yield name.name, member


def by_metadata(
    fields: tuple[str, ...], path: Path, entries: Iterable[Member]
) -> Iterator[tuple[str, Member]]:
    """Name images by ``fields`` of the JSON that img2dataset writes beside them in a tar.

    Raises:
        OSError: if an image has none, or it has none of the fields.
    """
    images: dict[str, Member] = {}
    metadata: dict[str, Member] = {}
    with open(path, "rb") as file:
        for member in entries:
            stem, suffix = os.path.splitext(member.name)
            if suffix == ".json":
                metadata[stem] = member
            elif suffix and suffix.lower() in IMAGE_SUFFIXES:
                images[stem] = member
            if stem in images and stem in metadata:
                image, beside = images.pop(stem), metadata.pop(stem)
                content = os.pread(file.fileno(), beside.size, beside.offset)
                for name in _fields(content, fields, f"{path}: {beside.name}"):
                    yield name, image
    if images:
        raise OSError(f"{path}: no .json beside {next(iter(images))}; {_NOT_IMG2DATASET}")


def _fields(content: bytes, fields: tuple[str, ...], where: str) -> list[str]:
    try:
        value = json.loads(content)
        found = [str(value[field]) for field in fields if value.get(field) not in (None, "")]
    except (ValueError, AttributeError) as error:
        raise OSError(f"{where}: {_NOT_IMG2DATASET}") from error
    if not found:
        raise OSError(f"{where}: no {' or '.join(fields)} in it; {_NOT_IMG2DATASET}")
    return found


class Downloaded:
    """Images that img2dataset has downloaded, as tars or as files, found by a field of their JSON."""

    def __init__(
        self,
        folders: Sequence[Path],
        archives: Sequence[Path],
        fields: tuple[str, ...],
        workers: int,
    ) -> None:
        self._archives = index_archives(archives, functools.partial(by_metadata, fields), workers)
        self._files: dict[int, str] = {}
        # A folder with tars is the webdataset form; its other contents are statistics.
        for folder in (f for f in folders if not any(f in a.parents for a in archives)):
            parts = sorted(path for path in folder.iterdir() if path.is_dir())
            for part in tqdm(parts, f"Reading {folder.name}", unit="folder"):
                self._add_folder(part, fields)

    def __len__(self) -> int:
        return len(self._archives) + len(self._files)

    def find(self, name: str) -> Locator | None:
        """The locator of the image whose JSON has ``name`` in one of the fields, or None."""
        path = self._files.get(digest(name))
        return self._archives.find(name) if path is None else [path]

    def _add_folder(self, folder: Path, fields: tuple[str, ...]) -> None:
        names = sorted(os.listdir(folder))
        images = {
            os.path.splitext(name)[0]: name
            for name in names
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES - {""}
        }
        for stem, image in images.items():
            beside = folder / f"{stem}.json"
            if not beside.exists():
                raise OSError(f"{folder / image}: no .json beside it; {_NOT_IMG2DATASET}")
            for name in _fields(beside.read_bytes(), fields, str(beside)):
                self._files.setdefault(digest(name), str(folder / image))


class Folders:
    """Finds image files by the layouts in use, without listing folders of millions.

    Every layout is tried until a thousand lookups have been made and a file was found; from then on
    paths under the layouts that had files are given unseen, as looking takes long on a network disk.
    """

    _PROBED = 1000

    def __init__(self, folders: Sequence[Path], layouts: int) -> None:
        self._places = [(folder, n) for folder in folders for n in range(layouts)]
        self._used: dict[tuple[Path, int], None] = {}
        self._looked_up = 0

    def find(self, names: Sequence[str]) -> list[str] | None:
        """Paths under which the file is or may be; None if it is not there.

        Args:
            names: relative path under each of the layouts.
        """
        self._looked_up += 1
        if self._used and self._looked_up > self._PROBED:
            return [os.path.join(folder, names[n]) for folder, n in self._used]
        for place in self._places:
            path = os.path.join(place[0], names[place[1]])
            if os.path.isfile(path):
                self._used[place] = None
                return [path]
        return None


_NOT_IMG2DATASET = (
    "is this the output of img2dataset, and did it end well? It resumes when run again"
)
