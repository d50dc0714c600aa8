"""Finding a row's picture: by its path, else by names that only one file has, or by its URL."""

from __future__ import annotations

import json
import os
import posixpath
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from otter_openclip.data import columnar, sources

MISSING, AMBIGUOUS, NOT_DOWNLOADED = "missing", "ambiguous", "not downloaded"
_LIMIT = 6  # files of one name that are looked at
_NOT_IMG2DATASET = (
    "is this the output of img2dataset, and did it end well? It resumes when run again"
)


class Found(NamedTuple):
    """A file, or None with the reason; ``whole`` if its path, not only its name, was looked for."""

    file: list[Any] | None
    whole: bool = True
    reason: str = MISSING
    detail: str = ""


class Hit(NamedTuple):
    """A file of the index and what a user calls it."""

    name: str
    file: list[Any]


class Index:
    """Files by key, on disk: millions of them in some megabytes of memory.

    The key of a path is its parts from the last to the first, so that all files whose path ends alike
    are neighbours. What is indexed stays for a build that goes on.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db, self._sorted = db, False
        for line in (
            "sources (id INTEGER PRIMARY KEY, path TEXT UNIQUE)",
            "files (key BLOB, source INTEGER, offset INTEGER, size INTEGER, how INTEGER)",
        ):
            db.execute(f"CREATE TABLE IF NOT EXISTS {line}")

    def add(self, source: str, entries: Iterable[tuple[bytes, Any, Any, Any]]) -> None:
        """Index what a folder or archive holds, (key, offset, size, how), unless it is indexed."""
        with self.db:
            if self.db.execute("SELECT 1 FROM sources WHERE path = ?", (source,)).fetchone():
                return
            self.db.execute("DROP INDEX IF EXISTS keys")
            self._sorted = False
            row = self.db.execute("INSERT INTO sources (path) VALUES (?)", (source,)).lastrowid
            self.db.executemany(
                f"INSERT INTO files VALUES (?, {row}, ?, ?, ?)",
                tqdm(entries, f"Indexing {os.path.basename(source)}", unit="file", delay=1),
            )

    def select(self, low: bytes, high: bytes | None = None) -> list[Hit]:
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
        return [_hit(*row) for row in rows]


def _hit(key: bytes, source: str, place: int | str | None, size: int, how: int) -> Hit:
    path = _turned(os.fsdecode(key))
    if how is None:
        path = place or f"{source}/{path}"
        return Hit(path, [path])
    return Hit(f"{path} in {source}", [source, place, size, how])


def _turned(path: str) -> str:
    return "/".join(reversed(path.split("/")))


def _key(path: str) -> bytes:
    return os.fsencode(_turned(posixpath.normpath(path).lstrip("/")))


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
    ) -> None:
        """Index the archives; folders here are indexed only if ``search`` and a path is not found."""
        self.index, self.any_suffix = index, any_suffix
        self.folders = [folder for folder in folders if "://" not in folder]
        self._unread = self.folders if search else []
        self._images = {
            "",
            *(s for s, f in Image.registered_extensions().items() if f in Image.OPEN),
        }
        for archive in archives:
            path = sources.local(archive, unpacked)
            index.add(path, ((_key(name), *rest) for name, *rest in sources.members(path)))
        for folder in folders:
            if "://" in folder:
                index.add(folder, _listed(folder))

    def find(self, *paths: str) -> Found:
        """The picture under the first of the relative or absolute ``paths`` that leads to one."""
        for path in paths:
            folders = [""] if os.path.isabs(path) else self.folders
            places = (os.path.normpath(os.path.join(folder, path)) for folder in folders)
            hits = [Hit(p, [p]) for p in dict.fromkeys(places) if os.path.isfile(p)]
            if hits := hits or self.index.select(_key(path)):
                return _the_one(hits, whole=True)
        while self._unread:
            folder, *self._unread = self._unread
            self.index.add(folder, _walked(folder))
        for path in paths:
            if found := self._by_name(_key(path)):
                return found
        return Found(None)

    def _by_name(self, key: bytes) -> Found | None:
        if self.any_suffix:
            stem = os.path.splitext(key.split(b"/")[0])[0]
            near = [*self.index.select(stem), *self.index.select(stem + b"/", stem + b"0")]
            near += [
                hit
                for hit in self.index.select(stem + b".", stem + b"/")
                if os.path.splitext(hit.name.split(" in ")[0])[1].lower() in self._images
            ]
            return _the_one(near, whole=False) if near else None
        parts = key.split(b"/")
        for count in range(len(parts), 0, -1):  # those that agree in most parts, from the last on
            end = b"/".join(parts[:count])
            if hits := self.index.select(end) + self.index.select(end + b"/", end + b"0"):
                return _the_one(hits, whole=False)
        return None


def _the_one(hits: Sequence[Hit], *, whole: bool) -> Found:
    if len(hits) == 1:
        return Found(hits[0].file, whole, detail=hits[0].name)
    return Found(None, whole, AMBIGUOUS, " or ".join(hit.name for hit in hits[:_LIMIT]))


def _walked(folder: str) -> Iterator[tuple]:
    for root, _, names in os.walk(folder):
        within = os.path.relpath(root, folder)
        for name in names:
            yield _key(os.path.join(within, name)), None, None, None


def _listed(address: str) -> Iterator[tuple]:
    """The files under an address, which cannot be asked for one by one."""
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
        fields: tuple[str, ...] = ("url",),
    ) -> None:
        """Index the images by what their JSON has in ``fields``.

        Raises:
            OSError: if an image has no JSON, or it has none of the fields.
        """
        self.index = index
        for archive in archives:
            path = sources.local(archive, unpacked)
            index.add(path, _by_fields(columnar.samples(path), path, fields))
        # A folder with tars is the webdataset form, with parquet files of images the parquet form.
        for folder in folders:
            if not any(os.path.dirname(archive) == folder for archive in archives):
                index.add(folder, _by_fields(_beside(folder), folder, fields))

    def find(self, *names: str) -> Found:
        """The image whose JSON has one of the ``names``, the first of several."""
        hits = (hit for name in names for hit in self.index.select(name.encode()))
        hit = next(hits, None)
        return Found(None, reason=NOT_DOWNLOADED) if hit is None else Found(hit.file)


def _by_fields(
    samples: Iterable[columnar.Sample], where: str, fields: tuple[str, ...]
) -> Iterator[tuple]:
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
        place, *rest = file if len(file) == 1 else file[1:]
        for key in found:
            yield key.encode(), place, *(rest or (None, None))


def _beside(folder: str) -> Iterator[columnar.Sample]:
    for part in sorted(entry.path for entry in os.scandir(folder) if entry.is_dir()):
        names = sorted(os.listdir(part))
        images = (os.path.splitext(n) for n in names if not n.endswith((".json", ".txt")))
        for stem, suffix in images:
            beside = Path(part, f"{stem}.json")
            content = beside.read_bytes() if beside.exists() else None
            yield columnar.Sample(os.path.join(part, stem), content, [f"{part}/{stem}{suffix}"])
