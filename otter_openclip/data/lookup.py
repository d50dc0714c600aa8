"""Finding a row's picture: by its path, else by what only one file's path ends with, or by its URL."""

from __future__ import annotations

import json
import os
import posixpath
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from otter_openclip.data import columnar, sources
from otter_openclip.data.decoding import IMAGE_SUFFIXES

MISSING, AMBIGUOUS, NOT_DOWNLOADED = "missing", "ambiguous", "not downloaded"
_LIMIT, _SHOWN = 64, 6  # files of one name that are looked at, and named
_NOT_IMG2DATASET = (
    "is this the output of img2dataset, and did it end well? It resumes when run again"
)
Entry = tuple[
    bytes, Any, Any, Any
]  # key, offset, size, how; of a folder its path or None for offset


class Found(NamedTuple):
    """A file and its name, or None with the reason; ``whole`` if all of its path was looked for."""

    file: list[Any] | None
    name: str = ""
    whole: bool = True
    reason: str = MISSING


class Index:
    """Files by key, on disk: millions of them in some megabytes of memory; kept for a resume.

    The key of a path is its parts from the last to the first, so that all files whose path ends alike
    are neighbours.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db, self._sorted = db, False
        db.executescript(
            "CREATE TABLE IF NOT EXISTS sources (id INTEGER PRIMARY KEY, path TEXT UNIQUE);"
            "CREATE TABLE IF NOT EXISTS files (key BLOB, source INT, offset, size INT, how INT);"
        )

    def add(self, source: str, entries: Iterable[Entry]) -> None:
        """Index what a folder or archive holds, unless it is indexed."""
        if self.db.execute("SELECT 1 FROM sources WHERE path = ?", (source,)).fetchone():
            return
        with self.db:
            self.db.execute("DROP INDEX IF EXISTS keys")
            self._sorted = False
            row = self.db.execute("INSERT INTO sources (path) VALUES (?)", (source,)).lastrowid
            bar = tqdm(entries, f"Indexing {os.path.basename(source)}", unit="file", delay=1)
            self.db.executemany(f"INSERT INTO files VALUES (?, {row}, ?, ?, ?)", bar)

    def select(self, low: bytes, high: bytes | None = None) -> list[Found]:
        """The files of the key ``low``, or of keys from it to below ``high``, at most ``_LIMIT``."""
        if not self._sorted:
            self.db.execute("CREATE INDEX IF NOT EXISTS keys ON files (key)")
            self._sorted = True
        where = "key = ?" if high is None else "key >= ? AND key < ?"
        rows = self.db.execute(
            "SELECT key, path, offset, size, how FROM files JOIN sources ON source = id "
            f"WHERE {where} ORDER BY key, source, offset LIMIT {_LIMIT}",
            (low,) if high is None else (low, high),
        )
        return [_found(*row) for row in rows]


def _found(key: bytes, source: str, place: int | str | None, size: int, how: int | None) -> Found:
    path = "/".join(reversed(os.fsdecode(key).split("/")))
    if how is None:
        path = place or f"{source}/{path}"
        return Found([path], path)
    return Found([source, place, size, how], f"{source}:{path}")


def _key(path: str) -> bytes:
    parts = posixpath.normpath(path).lstrip("/").split("/")
    return os.fsencode("/".join(reversed(parts)))


class Paths:
    """Pictures that rows name by a path.

    The path is looked for whole in every folder, then whole in the archives. If it is in none, files
    of its name are looked for below the folders and in the archives; of several that count whose paths
    agree with it in most parts. A picture is found only if there is one such file. With ``any_suffix`` a
    name stands for an image of any format.
    """

    def __init__(
        self,
        index: Index,
        folders: Sequence[str],
        archives: Iterable[str],
        unpacked: Path,
        *,
        any_suffix: bool = False,
        search: bool = True,
        first: bool = False,
    ) -> None:
        """Index the archives; folders here are indexed only if ``search`` and a path is not found.

        With ``first`` a path means the file in the first of the folders that has it.
        """
        self.index, self.any_suffix, self.first = index, any_suffix, first
        self.folders = [folder for folder in folders if "://" not in folder]
        self._unread = self.folders if search else []
        for archive in archives:
            path = sources.local(archive, unpacked)
            index.add(path, ((_key(name), *rest) for name, *rest in sources.members(path)))
        for folder in (folder for folder in folders if "://" in folder):
            index.add(folder, _listed(folder))

    def find(self, *paths: str) -> Found:
        """The picture under the first of the relative or absolute ``paths`` that leads to one."""
        for path in paths:
            folders = [""] if os.path.isabs(path) else self.folders
            places = {os.path.normpath(os.path.join(folder, path)): None for folder in folders}
            there = [Found([place], place) for place in places if os.path.isfile(place)]
            if there := there[: 1 if self.first else None] or self.index.select(_key(path)):
                return _only(there, whole=True)
        while self._unread:
            folder, *self._unread = self._unread
            self.index.add(folder, _walked(folder))
        for near in map(self._near, map(_key, paths)):
            if near:
                return _only(near, whole=False)
        return Found(None)

    def _near(self, key: bytes) -> list[Found]:
        parts, select = key.split(b"/"), self.index.select
        if self.any_suffix:
            stem = os.path.splitext(parts[0])[0]
            others = [*select(stem + b".", stem + b"/"), *select(stem + b"/", stem + b"0")]
            # Not those of another stem, "a.small.jpg" for "a".
            named = tuple(sign + os.fsdecode(stem) for sign in "/:")
            split = ((found, *os.path.splitext(found.name)) for found in others)
            images = (
                f
                for f, name, suffix in split
                if suffix.lower() in IMAGE_SUFFIXES and name.endswith(named)
            )
            return [*select(stem), *images]
        ends = (b"/".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next(filter(None, (select(e) + select(e + b"/", e + b"0") for e in ends)), [])


def _only(found: list[Found], *, whole: bool) -> Found:
    if len(found) == 1:
        return found[0]._replace(whole=whole)
    return Found(None, " or ".join(each.name for each in found[:_SHOWN]), whole, AMBIGUOUS)


def _walked(folder: str) -> Iterator[Entry]:
    for root, _, names in os.walk(folder):
        for name in names:
            yield _key(os.path.relpath(os.path.join(root, name), folder)), None, None, None


def _listed(address: str) -> Iterator[Entry]:
    import fsspec

    system, root = fsspec.core.url_to_fs(address)
    for path in system.find(root):
        yield _key(os.path.relpath(path, root)), system.unstrip_protocol(path), None, None


class Downloaded:
    """Images that img2dataset has downloaded, in any of its output formats, by fields of their JSON."""

    def __init__(
        self,
        index: Index,
        folders: Sequence[str],
        archives: Sequence[str],
        unpacked: Path,
        fields: tuple[str, ...],
    ) -> None:
        """Index the images by ``fields``; OSError if an image has no JSON with one of them."""
        self.index = index
        for archive in archives:
            path = sources.local(archive, unpacked)
            index.add(path, _by_fields(columnar.samples(path), path, fields))
        # A folder with archives is of another form; its other contents are statistics.
        packed = set(map(os.path.dirname, archives))
        for folder in (folder for folder in folders if folder not in packed):
            index.add(folder, _by_fields(_beside(folder), folder, fields))

    def find(self, *names: str) -> Found:
        """The image whose JSON has one of the ``names``, the first of several."""
        there = (found for name in names for found in self.index.select(name.encode()))
        return next(there, Found(None, reason=NOT_DOWNLOADED))


def _by_fields(
    samples: Iterable[columnar.Sample], where: str, fields: tuple[str, ...]
) -> Iterator[Entry]:
    for name, content, file in samples:
        if file is None:
            continue  # not downloaded
        if content is None:
            raise OSError(f"{where}: no .json beside {name}; {_NOT_IMG2DATASET}")
        try:
            value = json.loads(content)
            found = [str(value[field]) for field in fields if value.get(field) not in (None, "")]
        except (ValueError, AttributeError) as error:
            raise OSError(f"{where}: {name}.json: {_NOT_IMG2DATASET}") from error
        if not found:
            listed = " or ".join(fields)
            raise OSError(f"{where}: {name}.json: no {listed} in it; {_NOT_IMG2DATASET}")
        place = (file[0], None, None) if len(file) == 1 else file[1:]
        yield from ((key.encode(), *place) for key in found)


def _beside(folder: str) -> Iterator[columnar.Sample]:
    for part in sorted(entry.path for entry in os.scandir(folder) if entry.is_dir()):
        for name in sorted(os.listdir(part)):
            stem, suffix = os.path.splitext(os.path.join(part, name))
            if suffix.lower() in IMAGE_SUFFIXES:
                beside = Path(f"{stem}.json")
                content = beside.read_bytes() if beside.exists() else None
                yield columnar.Sample(stem, content, [stem + suffix])
