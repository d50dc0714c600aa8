"""Finding a row's picture: by its path, else by what only one file's path ends with, or by its URL."""

from __future__ import annotations

import itertools
import json
import os
import posixpath
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from otter_openclip.data import sources, unpacking
from otter_openclip.data.decoding import IMAGE_SUFFIXES
from otter_openclip.data.sources import Member

MISSING, AMBIGUOUS, NOT_DOWNLOADED = "missing", "ambiguous", "not downloaded"
_LIMIT, _SHOWN = 64, 6  # files of one name that are looked at, and named
_NOT_IMG2DATASET = "is this the output of img2dataset, did it end well? It resumes when run again"


class Found(NamedTuple):
    """A file and its name, or None with the reason; ``whole`` if all of its path was looked for."""

    file: list[Any] | None
    name: str = ""
    whole: bool = True
    reason: str = MISSING


class Index:
    """Files by key, on disk: millions of them in some megabytes of memory; kept for a resume."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db, self._sorted = db, False
        db.executescript(
            "CREATE TABLE IF NOT EXISTS sources (id INTEGER PRIMARY KEY, path TEXT UNIQUE);"
            "CREATE TABLE IF NOT EXISTS files (key BLOB, source INT, place, size INT, how INT);"
        )

    def add(self, source: str, entries: Iterable[tuple[bytes, Any, Any, Any]]) -> None:
        """Index the (key, place, size, how) of a folder's or archive's files, unless it is indexed."""
        if self.db.execute("SELECT 1 FROM sources WHERE path = ?", (source,)).fetchone():
            return
        with self.db:
            self.db.execute("DROP INDEX IF EXISTS keys")
            self._sorted = False
            row = self.db.execute("INSERT INTO sources (path) VALUES (?)", (source,)).lastrowid
            bar = tqdm(entries, f"Indexing {os.path.basename(source)}", unit="file", delay=1)
            self.db.executemany(f"INSERT INTO files VALUES (?, {row}, ?, ?, ?)", bar)

    def select(self, low: bytes, high: bytes | None = None, limit: int = _LIMIT) -> list[Found]:
        """The files of the key ``low``, or of keys from it to below ``high``; a limit of -1 is none."""
        if not self._sorted:
            self.db.execute("CREATE INDEX IF NOT EXISTS keys ON files (key)")
            self._sorted = True
        query = f"""SELECT key, path, place, size, how FROM files JOIN sources ON source = id
            WHERE key >= ? AND key < ? ORDER BY key, source, place LIMIT {limit}"""
        rows = self.db.execute(query, (low, high or low + b"\0"))
        return [_found(*row) for row in rows]


def _found(key: bytes, source: str, *place: Any) -> Found:
    member = Member("/".join(reversed(os.fsdecode(key).split("/"))), *place)
    file = member.file(source)
    return Found(file, file[0] if len(file) == 1 else f"{source}:{member.name}")


def _spellings(path: str) -> Iterator[str]:
    """The path with \\ as on Windows, and accents as the world or macOS writes them."""
    for spelled in (path, path.replace("\\", "/")):
        yield from (unicodedata.normalize(form, spelled) for form in ("NFC", "NFD"))


def _key(path: str) -> bytes:
    """A path's parts from the last to the first: files whose path ends alike are neighbours."""
    parts = posixpath.normpath(path).lstrip("/").split("/")
    return os.fsencode("/".join(reversed(parts)))


@dataclass
class Paths:
    """Pictures that rows name by a path, in the ``given`` folders and archives.

    The path is looked for whole in every folder, then whole in the archives. If it is in none, files
    of its name are looked for below the folders and in the archives; of several that count whose paths
    agree with it in most parts. A picture is found only if there is one such file. Raises as
    `sources.expand`.
    """

    given: Iterable[str]
    any_suffix: bool = False  # a name stands for an image of any format
    search: bool = True  # also below the folders
    first: bool = False  # a path means its file in the first of the folders that has it

    def __post_init__(self) -> None:
        self.folders, self.archives = sources.expand(self.given)
        self._unread = [f for f in self.folders if self.search and "://" not in f]

    def open(self, index: Index, unpacked: Path) -> None:
        """Index the archives and addresses; folders here are only if a path is not found."""
        self.index = index
        remote = [folder for folder in self.folders if "://" in folder]
        for source in [*(unpacking.local(a, unpacked) for a in self.archives), *remote]:
            self._add(source)

    def _add(self, source: str) -> None:
        self.index.add(source, ((_key(name), *place) for name, *place in sources.members(source)))

    def find(self, *paths: str) -> Found:
        """The picture under the first of the relative or absolute ``paths`` that leads to one."""
        every = dict.fromkeys(itertools.chain(paths, *map(_spellings, paths)))
        for path in every:
            folders = [""] if os.path.isabs(path) else self.folders
            # ".." behind a link to a folder leads elsewhere.
            plain = os.path.realpath if ".." in path else os.path.normpath
            places = {plain(os.path.join(folder, path)): None for folder in folders}
            there = [Found([place], place) for place in places if os.path.isfile(place)]
            if there := there[: 1 if self.first else None] or self.index.select(_key(path)):
                return _only(there, whole=path in paths)
        while self._unread:
            self._add(self._unread.pop(0))
        near = next(filter(None, map(self._near, map(_key, every))), None)
        return _only(near, whole=False) if near else Found(None)

    def _near(self, key: bytes) -> list[Found]:
        parts, select = key.split(b"/"), self.index.select
        if not self.any_suffix:
            ends = (b"/".join(parts[:count]) for count in range(len(parts), 0, -1))
            return next(filter(None, (select(e) + select(e + b"/", e + b"0") for e in ends)), [])
        stem = os.path.splitext(parts[0])[0]
        others = [*select(stem + b".", stem + b"/", -1), *select(stem + b"/", stem + b"0")]
        # Not those of another stem, "a.small.jpg" for "a".
        named = tuple(sign + os.fsdecode(stem) for sign in "/:")
        split = ((found, *os.path.splitext(found.name)) for found in others)
        images = [f for f, n, s in split if s.lower() in IMAGE_SUFFIXES and n.endswith(named)]
        return [*select(stem), *images]


def _only(found: list[Found], *, whole: bool) -> Found:
    if len(found) == 1:
        return found[0]._replace(whole=whole)
    return Found(None, " or ".join(each.name for each in found[:_SHOWN]), whole, AMBIGUOUS)


def _of_statistics(path: str) -> bool:
    """Whether it is what img2dataset writes beside a part's tar or folder, not images in a parquet."""
    part, suffix = os.path.splitext(path)
    return suffix.lower() in sources.TABLES and any(map(os.path.exists, (part, f"{part}.tar")))


@dataclass
class Downloaded:
    """Images that img2dataset has downloaded, in any of its output formats, by fields of their JSON."""

    given: Sequence[str]
    fields: Sequence[str]

    def __post_init__(self) -> None:
        suffixes = (*sources.ARCHIVES, *sources.TABLES)
        self.folders, found = sources.expand(self.given, suffixes)
        self.archives = [p for p in found if p in self.given or not _of_statistics(p)]

    def open(self, index: Index, unpacked: Path) -> None:
        """Index the images; OSError if one has no JSON with one of the fields."""
        self.index = index
        for source in [*(unpacking.local(a, unpacked) for a in self.archives), *self.folders]:
            index.add(source, self._entries(source))

    def find(self, *names: str) -> Found:
        """The image whose JSON has one of the ``names``, the first of several."""
        there = (found for name in names for found in self.index.select(name.encode()))
        return next(there, Found(None, reason=NOT_DOWNLOADED))

    def _entries(self, source: str) -> Iterator[tuple[bytes, Any, Any, Any]]:
        for name, metadata, file in sources.samples(source):
            beside = metadata is None and source in self.folders and "/" not in name
            if file is None or beside:
                continue  # not downloaded, or lies beside the parts
            where = f"{source}: {name}.json"
            if metadata is None:
                raise OSError(f"{source}: no .json beside {name}; {_NOT_IMG2DATASET}")
            try:
                value = json.loads(metadata)
                found = [str(value[f]) for f in self.fields if value.get(f) not in (None, "")]
            except (ValueError, AttributeError) as error:
                raise OSError(f"{where}: {_NOT_IMG2DATASET}") from error
            if not found:
                listed = " or ".join(self.fields)
                raise OSError(f"{where}: no {listed} in it; {_NOT_IMG2DATASET}")
            place = (file[0], None, None) if len(file) == 1 else file[1:]
            yield from ((key.encode(), *place) for key in found)
