"""The plan of a build: its samples, where their pictures are, and what became of them, in SQLite."""

from __future__ import annotations

import itertools
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from otter_openclip.data import sources
from otter_openclip.data.lookup import AMBIGUOUS, NOT_DOWNLOADED, Index, Picture
from otter_openclip.data.sources import File
from otter_openclip.files import written_whole

DROPPED_FILE = "dropped.tsv"
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_TABLES = """
CREATE TABLE IF NOT EXISTS begun (settings TEXT);
CREATE TABLE IF NOT EXISTS samples (id INTEGER PRIMARY KEY, key TEXT, name TEXT, file TEXT,
    at_full_path INTEGER, text TEXT, identity BLOB UNIQUE);
CREATE TABLE IF NOT EXISTS skipped (reason TEXT PRIMARY KEY, count INTEGER);
-- last: how many samples are done, in their order, once the shard is; 0 of one dropped before.
CREATE TABLE IF NOT EXISTS dropped (id INTEGER, name TEXT, reason TEXT, detail TEXT, last INTEGER);
CREATE TABLE IF NOT EXISTS shards (name TEXT, samples INTEGER, size INTEGER, last INTEGER);
"""
_SHARED = """
SELECT file, id, name, at_full_path FROM samples
WHERE file IN (SELECT file FROM samples GROUP BY file HAVING COUNT(DISTINCT name) > 1)
ORDER BY file, at_full_path DESC, id
"""


class Sample(NamedTuple):
    """A sample: id, key, what the user knows it by, its image's file, its caption or labels."""

    id: int
    key: str
    name: str
    file: File
    text: str


class Plan:
    """The samples and what became of them, on disk; ``record`` is what a sample's name stands for."""

    def __init__(self, path: Path, record: str) -> None:
        self.folder, self.record, self._added = path.parent, record, 0
        self.db = sqlite3.connect(path)
        self.db.executescript(_TABLES)
        self.index = Index(self.db)

    @property
    def begun(self) -> dict[str, Any]:
        """The settings and inputs that the build was begun with."""
        return json.loads(self.db.execute("SELECT settings FROM begun").fetchone()[0])

    def add(
        self, name: str, picture: Picture, text: str, *, key: str | None = None, where: str = ""
    ) -> None:
        """Append a sample, or drop it: without picture or caption, or there already.

        There already is a ``key`` or, without one, a file with its text. ``where`` is the row, for the
        report.
        """
        self._added += 1  # the id, of which keys are made: whatever becomes of others, it stays
        if picture.reason == NOT_DOWNLOADED:
            return self.skip(NOT_DOWNLOADED)
        if picture.file is None:
            return self.drop(name, picture.reason, picture.name or where)
        if not text.strip():
            return self.drop(name, "empty caption", where)
        if key is not None and not _KEY.fullmatch(key):
            fault = "cannot be the key of a webdataset sample (letters, digits, - and _)"
            raise ValueError(f"{name}: {key!r} {fault}")
        file = json.dumps(picture.file)
        identity = sources.digest(key or file + text)
        insert = "INSERT OR IGNORE INTO samples VALUES (?, ?, ?, ?, ?, ?, ?)"
        row = self._added, key, name, file, picture.at_full_path, text, identity
        if not self.db.execute(insert, row).rowcount:
            self.drop(name, "duplicate", where)

    def drop_shared(self) -> None:
        """Drop samples of several names that have one file, unless a name is the file's whole path.

        If names are not paths but URLs or the like, the first that led a downloader to it stays.
        """
        shared = self.db.execute(_SHARED)
        for file, group in itertools.groupby(shared, lambda sample: sample[0]):
            rows = [row[1:] for row in group]
            _, first, sure = rows[0]
            reason = f"file name of another {self.record}" if sure else AMBIGUOUS
            for id, name, at_full_path in rows:
                if not at_full_path or (self.record != "row" and name != first):
                    other = next(each for _, each, _ in rows if each != name)
                    self.drop(name, reason, f"{other} has {file}", id=id)
        self.db.execute("DELETE FROM samples WHERE id IN (SELECT id FROM dropped)")

    def drop_keys(self, keys: Iterable[str], reason: str) -> None:
        """Drop the samples of some ``keys``; ValueError for a key that there is not."""
        for key in keys:
            number = int(key) + 1 if key.isdecimal() else None
            query = "SELECT id, name FROM samples WHERE key = ? OR (key IS NULL AND id = ?)"
            row = self.db.execute(query, (key, number)).fetchone()
            if row is None:
                raise ValueError(f"no sample has the key {key}: the list is of another build")
            self.drop(row[1], reason, key, id=row[0])
        self.db.execute("DELETE FROM samples WHERE id IN (SELECT id FROM dropped)")

    def drop(
        self, name: str, reason: str, detail: str = "", *, id: int | None = None, last: int = 0
    ) -> None:
        """List a sample in the report; one that was planned by its ``id`` and its shard's ``last``."""
        row = id, *(" ".join(text.split()) for text in (name, reason, detail)), last
        self.db.execute("INSERT INTO dropped VALUES (?, ?, ?, ?, ?)", row)

    def skip(self, reason: str, count: int = 1) -> None:
        """Count samples that do not belong to the result."""
        add = "ON CONFLICT(reason) DO UPDATE SET count = count + excluded.count"
        self.db.execute(f"INSERT INTO skipped VALUES (?, ?) {add}", (reason, count))

    def order(self, seed: int | None = None) -> np.ndarray:
        """The samples' ids as they come in the shards, those included that turn out unreadable."""
        rows = self.db.execute("SELECT id FROM samples ORDER BY id")
        ids = np.fromiter((id for (id,) in rows), np.int64)
        return ids if seed is None else np.random.default_rng(seed).permutation(ids)

    def sample(self, id: int) -> Sample:
        """The sample of an id; its key is by default its number."""
        query = "SELECT key, name, file, text FROM samples WHERE id = ?"
        key, name, file, text = self.db.execute(query, (id,)).fetchone()
        return Sample(id, key or f"{id - 1:09d}", name, File(*json.loads(file)), text)

    def written(self) -> Iterator[Sample]:
        """The samples that are in shards, in the order of the input."""
        gone = "SELECT id FROM dropped WHERE id IS NOT NULL"
        query = f"SELECT id FROM samples WHERE id NOT IN ({gone}) ORDER BY id"
        yield from (self.sample(id) for (id,) in self.db.execute(query))

    def report(self) -> dict[str, Any]:
        """Numbers of samples and shards, counts by reason, and the shards' (name, samples, bytes)."""
        select = self.db.execute
        written = select("SELECT name, samples, size FROM shards WHERE samples ORDER BY last")
        written = written.fetchall()
        return {
            "samples": sum(samples for _, samples, _ in written),
            "shards": len(written),
            "dropped": dict(select("SELECT reason, COUNT(*) FROM dropped GROUP BY reason")),
            "skipped": dict(select("SELECT reason, count FROM skipped ORDER BY reason")),
            "written": written,
            "begun": self.begun,
        }

    def write_dropped(self, folder: Path) -> None:
        """Write the list of dropped samples."""
        with written_whole(folder / DROPPED_FILE, "w") as file:
            file.write("sample\treason\tdetail\n")
            query = "SELECT name, reason, detail FROM dropped ORDER BY last, rowid"
            file.writelines("\t".join(row) + "\n" for row in self.db.execute(query))
