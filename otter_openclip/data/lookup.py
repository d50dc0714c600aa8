"""Finding a row's picture: by its path, else as the only file of its name; or by its URL."""

from __future__ import annotations

import json
import os
import posixpath
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from otter_openclip.data import sources
from otter_openclip.data.decoding import IMAGE_SUFFIXES
from otter_openclip.data.sources import File

MISSING, AMBIGUOUS, NOT_DOWNLOADED = "missing", "ambiguous", "not downloaded"
_SHOWN = 6  # files of one name that are looked at, and named
_NOT_IMG2DATASET = "is this the output of img2dataset, did it end well? It resumes when run again"


class Picture(NamedTuple):
    """A picture's file and what it is called, or None and the reason with what else there is.

    ``at_full_path`` if the file is at the row's whole path, not only the one file of its name.
    """

    file: File | None
    name: str = ""
    at_full_path: bool = True
    reason: str = MISSING


class Index:
    """Files by name, on disk: millions of them in some megabytes of memory."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        db.execute("CREATE TABLE IF NOT EXISTS files (name BLOB, path BLOB, file TEXT)")

    def add(self, source: str, entries: Iterable[tuple[str, str, File]]) -> None:
        """Take in the (name, path, file) of all files of a folder or archive."""
        bar = tqdm(entries, f"Indexing {os.path.basename(source)}", unit="file", delay=1)
        rows = (
            (os.fsencode(name), os.fsencode(path), json.dumps(file)) for name, path, file in bar
        )
        self.db.execute("DROP INDEX IF EXISTS names")  # which slows insertion
        self.db.executemany("INSERT INTO files VALUES (?, ?, ?)", rows)

    def select(self, name: str, path: str | None = None) -> list[Picture]:
        """The first files of a ``name``, or those of them that are at ``path``."""
        self.db.execute("CREATE INDEX IF NOT EXISTS names ON files (name, path)")
        query, values = "SELECT path, file FROM files WHERE name = ?", [os.fsencode(name)]
        if path is not None:
            query, values = f"{query} AND path = ?", [*values, os.fsencode(path)]
        rows = self.db.execute(f"{query} ORDER BY path, rowid LIMIT {_SHOWN}", values)
        return [_picture(os.fsdecode(path), File(*json.loads(file))) for path, file in rows]


def _picture(path: str, file: File) -> Picture:
    return Picture(file, file.path if file.offset is None else f"{file.path}:{path}")


@dataclass
class Paths:
    """Pictures that rows name by a path, in the folders and archives of ``places``.

    A picture is the file that is at its whole path below a folder or, if none is, in an archive; or else
    the only file of its name in all of them. With ``any_suffix`` a name stands for an image of any
    format. Raises as `sources.expand`.
    """

    places: Iterable[str]
    any_suffix: bool = False

    def __post_init__(self) -> None:
        self.folders, self.archives = sources.expand(self.places)
        self._unlisted = list(self.folders)

    def open(self, index: Index, folder: Path) -> None:
        """List archives, unpacked into ``folder``; folders are listed once a path is not there."""
        self.index = index
        for archive in self.archives:
            self._list(sources.unpacked(archive, folder))

    def _list(self, source: str) -> None:
        files = ((posixpath.normpath(n).lstrip("/"), file) for n, file in sources.members(source))
        if self.any_suffix:
            files = (each for each in files if _suffix(each[0]) in IMAGE_SUFFIXES)
        self.index.add(source, ((self._name(path), path, file) for path, file in files))

    def _name(self, path: str) -> str:
        name = posixpath.basename(path)
        return os.path.splitext(name)[0] if self.any_suffix else name

    def find(self, *paths: str) -> Picture:
        """The picture under the first of the relative or absolute ``paths`` that leads to one."""
        for path in paths:
            if pictures := self._at(path):
                return _only(pictures, at_full_path=True)
        while self._unlisted:
            self._list(self._unlisted.pop(0))
        for path in paths:
            if pictures := self.index.select(self._name(path)):
                return _only(pictures, at_full_path=False)
        return Picture(None)

    def _at(self, path: str) -> list[Picture]:
        """The files at a path: of the folders, or else of the archives."""
        folders = [""] if os.path.isabs(path) else self.folders
        # ".." behind a link to a folder leads elsewhere.
        plain = os.path.realpath if ".." in path else os.path.normpath
        places = dict.fromkeys(plain(os.path.join(folder, path)) for folder in folders)
        files = [Picture(File(place), place) for place in places if os.path.isfile(place)]
        inside = posixpath.normpath(path).lstrip("/")
        return files or self.index.select(self._name(inside), inside)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _only(pictures: list[Picture], *, at_full_path: bool) -> Picture:
    if len(pictures) == 1:
        return pictures[0]._replace(at_full_path=at_full_path)
    names = " or ".join(picture.name for picture in pictures)
    return Picture(None, names, at_full_path, AMBIGUOUS)


@dataclass
class Downloaded:
    """Images that img2dataset has downloaded, as files or webdataset, by the URL in their JSON."""

    places: Sequence[str]

    def __post_init__(self) -> None:
        self.folders, self.archives = sources.expand(self.places)

    def open(self, index: Index, folder: Path) -> None:
        """List the images; OSError if one has no JSON with its URL, ValueError if there is none."""
        self.index = index
        for source in [*(sources.unpacked(a, folder) for a in self.archives), *self.folders]:
            index.add(source, self._entries(source))
        if not index.db.execute("SELECT 1 FROM files").fetchone():
            fault = "no image there, and parquet and tfrecord files cannot be read"
            fix = "download with --output_format webdataset or files"
            raise ValueError(f"--img2dataset {' '.join(self.places)}: {fault}; {fix}")

    def find(self, url: str) -> Picture:
        """The first image of a URL."""
        pictures = self.index.select(url)
        return pictures[0] if pictures else Picture(None, reason=NOT_DOWNLOADED)

    def _entries(self, source: str) -> Iterator[tuple[str, str, File]]:
        for name, files in sources.samples(source):
            images = [files[suffix] for suffix in files if suffix and suffix in IMAGE_SUFFIXES]
            try:
                for image in images:  # none if it was not downloaded
                    yield str(json.loads(sources.read(files[".json"]))["url"]), name, image
            except (ValueError, KeyError, TypeError):
                fault = f"{source}: no url in {name}.json; {_NOT_IMG2DATASET}"
                raise OSError(fault) from None
