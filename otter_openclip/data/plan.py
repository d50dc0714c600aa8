"""The plan of a build: its samples, where their pictures are, and what became of them, in SQLite."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from otter_openclip.data import sources
from otter_openclip.data.lookup import AMBIGUOUS, NOT_DOWNLOADED, Found, Index
from otter_openclip.files import written_whole

DROPPED_FILE = "dropped.tsv"
DUPLICATE, CLAIMED, EMPTY_CAPTION = "duplicate", "file name of another", "empty caption"
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS samples (id INTEGER PRIMARY KEY, key TEXT, name TEXT, file TEXT,
    payload TEXT, exact INTEGER, claim BLOB, identity BLOB UNIQUE, state TEXT DEFAULT 'kept');
CREATE INDEX IF NOT EXISTS claims ON samples (claim);
CREATE TABLE IF NOT EXISTS dropped (name TEXT, reason TEXT, detail TEXT, last INTEGER);
CREATE TABLE IF NOT EXISTS skipped (reason TEXT, count INTEGER);
CREATE TABLE IF NOT EXISTS shards (name TEXT, samples INTEGER, size INTEGER, last INTEGER);
"""


class Sample(NamedTuple):
    """A sample: id, key, what the user knows it by, its image's file, its caption or labels."""

    id: int
    key: str
    name: str
    file: list[Any]
    payload: Any


class Plan:
    """The samples and what became of them, on disk."""

    def __init__(self, folder: Path, record: str) -> None:
        self.folder, self.record = folder, record
        self.db = sqlite3.connect(folder / "plan.db")
        self.db.executescript(_TABLES)
        self.index = Index(self.db)

    def __getitem__(self, name: str) -> Any:
        row = self.db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return row and json.loads(row[0])

    def __setitem__(self, name: str, value: Any) -> None:
        self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))

    def clear(self, *, index: bool) -> None:
        """Forget a plan that was not finished, and on demand the index of files."""
        for table in ("samples", "dropped", "skipped", *(("sources", "files") if index else ())):
            self.db.execute(f"DELETE FROM {table}")

    def add(
        self, name: str, found: Found, payload: Any, *, key: str | None = None, where: str = ""
    ) -> None:
        """Append a sample, or drop it: without picture or caption, repeated, with another's picture.

        Repeated is a ``key`` or, without one, a file with its payload. Of two names of which neither is
        surely the file's none is kept; ``where`` is the row, for the report.
        """
        if found.file is None:
            if found.reason == NOT_DOWNLOADED:
                return self.skip(NOT_DOWNLOADED)
            return self.drop(name, found.reason, found.name or where)
        if isinstance(payload, str) and not payload.strip():
            return self.drop(name, EMPTY_CAPTION, where)
        if key is not None and not _KEY.fullmatch(key):
            fault = "cannot be the key of a webdataset sample (letters, digits, - and _)"
            raise ValueError(f"{name}: {key!r} {fault}")
        file, content = json.dumps(found.file), json.dumps(payload)
        claim, identity = sources.digest(file), sources.digest(key or file + content)
        exact = found.whole * (2 if self.record == "row" else 1)  # a path is the file, a URL is not
        known = "SELECT name, exact, state FROM samples WHERE claim = ? ORDER BY exact DESC, id"
        other, sure, state = self.db.execute(known, (claim,)).fetchone() or (name, 0, "")
        if (other != name and not exact == sure == 2) or state == "no":
            reason = f"{CLAIMED} {self.record}" if exact or sure else AMBIGUOUS
            if state == "kept" and (exact > sure or reason == AMBIGUOUS):
                kept = "SELECT id, name FROM samples WHERE claim = ? AND state = 'kept'"
                for id, each in self.db.execute(kept, (claim,)).fetchall():
                    self.db.execute("UPDATE samples SET state = 'no' WHERE id = ?", (id,))
                    self.drop(each, reason, f"{name} has {file}")
            if exact <= sure:
                return self.drop(name, reason, f"{other} has {file}")
        columns = "(key, name, file, payload, exact, claim, identity)"
        row = key, name, file, content, exact, claim, identity
        insert = f"INSERT OR IGNORE INTO samples {columns} VALUES (?, ?, ?, ?, ?, ?, ?)"
        return None if self.db.execute(insert, row).rowcount else self.drop(name, DUPLICATE, where)

    def drop(self, name: str, reason: str, detail: str = "", last: int = 0) -> None:
        """List a sample in the report instead of writing it; ``last`` ends the shard it would be in."""
        row = (" ".join(text.split()) for text in (name, reason, detail))
        self.db.execute("INSERT INTO dropped VALUES (?, ?, ?, ?)", (*row, last))

    def skip(self, reason: str, count: int = 1) -> None:
        """Count samples that do not belong to the result."""
        self.db.execute("INSERT INTO skipped VALUES (?, ?)", (reason, count))

    def __len__(self) -> int:
        return self.db.execute("SELECT COUNT(*) FROM samples WHERE state != 'no'").fetchone()[0]

    def order(self, seed: int | None = None) -> np.ndarray:
        """The samples' ids as they come in the shards, those included that turn out unreadable."""
        rows = self.db.execute("SELECT id FROM samples WHERE state != 'no' ORDER BY id")
        ids = np.fromiter((id for (id,) in rows), np.int64)
        return ids if seed is None else np.random.default_rng(seed).permutation(ids)

    def sample(self, id: int) -> Sample:
        """The sample of an id; its key is by default its number."""
        query = "SELECT key, name, file, payload FROM samples WHERE id = ?"
        key, name, file, payload = self.db.execute(query, (id,)).fetchone()
        return Sample(id, key or f"{id - 1:09d}", name, json.loads(file), json.loads(payload))

    def kept(self) -> Iterator[Sample]:
        """The samples that were written, in the order of the input."""
        for (id,) in self.db.execute("SELECT id FROM samples WHERE state = 'kept' ORDER BY id"):
            yield self.sample(id)

    def report(self) -> dict[str, Any]:
        """Numbers of samples and shards, counts by reason, and the shards' (name, samples, bytes)."""
        select = self.db.execute
        written = select("SELECT name, samples, size FROM shards WHERE samples ORDER BY last")
        written = written.fetchall()
        return {
            "samples": sum(samples for _, samples, _ in written),
            "shards": len(written),
            "dropped": dict(select("SELECT reason, COUNT(*) FROM dropped GROUP BY reason")),
            "skipped": dict(select("SELECT reason, SUM(count) FROM skipped GROUP BY reason")),
            "written": written,
        }

    def write_dropped(self, folder: Path) -> None:
        """Write the list of dropped samples."""
        with written_whole(folder / DROPPED_FILE, "w") as file:
            file.write("sample\treason\tdetail\n")
            query = "SELECT name, reason, detail FROM dropped ORDER BY last, rowid"
            file.writelines("\t".join(row) + "\n" for row in self.db.execute(query))
