"""Shards from a plan of their samples: the same bytes for any number of workers, after any kill.

The plan, an SQLite file in OUT/.otter-build, holds the samples, cut into shards by position before any
image is read, and how far the finished shards go. Workers read images; one process writes the shards,
in order, each to a temporary name first. ``report.json`` comes last: an output with it is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import sqlite3
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from otter_openclip.data import sources, tables
from otter_openclip.data.decoding import prepare
from otter_openclip.data.lookup import AMBIGUOUS, MISSING, Downloaded, Paths
from otter_openclip.data.plan import DROPPED_FILE, Plan, Sample
from otter_openclip.data.pool import ordered_map
from otter_openclip.data.unpacking import add_sample
from otter_openclip.files import write_json, written_whole
from otter_openclip.shards.faults import SampleError

STATE_FOLDER, REPORT_FILE, UNDECODABLE = ".otter-build", "report.json", "undecodable"
ENOUGH_SHARDS = 8
_LOCK_SECONDS = 10.0
_CHUNK = 16  # images a worker reads at a time
_NOT_OF_THE_RESULT = ("output", "workers", "max_missing")  # options that a resume may change


@dataclass
class Build:
    """What to build, and how; `run` does it."""

    args: argparse.Namespace  # the command and its options, with those of `options.add_output`
    inputs: Sequence[str]  # files that the result depends on, beside the archives of ``images``
    images: Paths | Downloaded | None  # opened before the plan is filled
    fill: Callable[[Plan], None]  # again if the last attempt did not finish it
    finish: Callable[[Path, Plan], None]  # writes the small files of the data set
    encode: Callable[[Any], tuple[str, bytes]]  # a payload's suffix and content
    shard_name: str  # format, from the shard's number
    record: str  # what a name stands for: "row" if it is the picture's path, or URL, photo, image

    def __post_init__(self) -> None:
        self.shown = self.args.output
        self.remote = "://" in self.shown  # then built in a folder that is uploaded in the end
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = Path(cache, "otter-openclip", sources.digest(self.shown).hex())
        self.output = folder if self.remote else Path(self.shown)
        self.state = self.output / STATE_FOLDER
        # What a resume must repeat.
        settings = {
            name.replace("_", "-"): " ".join(value) if isinstance(value, list) else value
            for name, value in vars(self.args).items()
            if name not in _NOT_OF_THE_RESULT and value is not None and value is not False
        }
        inputs = [*self.inputs, *(self.images.archives if self.images else ())]
        self.begun = {"settings": settings, "inputs": {p: sources.stamp(p) for p in inputs}}

    def run(self) -> dict[str, Any]:
        """Build, or go on with a build that was stopped, or see that it is complete; the report.

        ValueError if the output holds something else or a build with other settings or inputs, nothing
        could be kept, or too many pictures are missing; RuntimeError if another process builds there, or
        a worker was killed; OSError if something cannot be read or written.
        """
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"{self.output} is a file; give --output a folder")
        if self.output.is_dir() and any(self.output.iterdir()) and not self.state.is_dir():
            fault = "holds files that are not of 'otter-openclip data'"
            raise ValueError(f"{self.output} {fault}; choose another --output")
        if self.remote:
            with contextlib.suppress(FileNotFoundError):
                report = json.loads(sources.read([f"{self.shown}/{REPORT_FILE}"]))
                self._check_same(report)
                return self._say(report)
        self.state.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.state / "lock", timeout=_LOCK_SECONDS):
                report = self._complete() or self._build()
                for path in self.state.glob("plan.db*"):
                    path.unlink()
                shutil.rmtree(self.state / "unpacked", ignore_errors=True)
                if self.remote:
                    self._upload()
        except Timeout:
            fault = f"another process is building in {self.output}; wait for it or end it"
            raise RuntimeError(fault) from None
        return self._say(report)

    def _say(self, report: dict[str, Any]) -> dict[str, Any]:
        shards = f"{report['shards']} shard{'s' if report['shards'] > 1 else ''}"
        print(f"{self.shown}: {report['samples']} samples in {shards}.")
        for name, what in (("dropped", "Dropped"), ("skipped", "Left out")):
            if counts := report[name]:
                print(f"{what}: {_counts(counts)}.")
        if report["dropped"]:
            print(f"Which were dropped, and why: {self.shown}/{DROPPED_FILE}")
        return report

    def _check_same(self, before: dict[str, Any]) -> None:
        """Raise ValueError if settings or inputs are not those that the build was begun with."""
        differences = []
        for kind, values in self.begun.items():
            for name in before[kind] | values:
                old, new = (each.get(name, "not given") for each in (before[kind], values))
                if old != new and kind == "inputs":
                    differences.append(f"{name} has changed")
                elif old != new:
                    flag = name if name == "command" else f"--{name}"
                    differences.append(f"{flag} was {old} and is now {new}")
        if differences:
            fault = f"{self.shown} was begun differently: {'; '.join(differences[:5])}"
            raise ValueError(f"{fault}. Run it as it was begun, or choose another --output")

    def _complete(self) -> dict[str, Any] | None:
        """The report of a build that is complete."""
        if not (self.output / REPORT_FILE).exists():
            return None
        report = json.loads((self.output / REPORT_FILE).read_text(encoding="utf-8"))
        if "written" not in report:
            raise ValueError(f"{self.output} is of an earlier version; choose another --output")
        self._check_same(report)
        for name, _, size in report["written"]:
            if not _is_there(self.output / name, size):
                fault = f"is gone or is not the shard of {size} bytes that was written"
                raise ValueError(f"{self.output / name} {fault}; build into a new folder")
        return report

    def _build(self) -> dict[str, Any]:
        try:
            plan = Plan(self.state, self.record)
            with contextlib.closing(plan.db):
                if plan["planned"]:
                    self._check_same(plan["begun"])
                    self._check_lost(plan)
                else:
                    self._fill(plan)
                self._write_shards(plan)
                self._check_lost(plan)
                plan.write_dropped(self.output)
                self.finish(self.output, plan)
                report = plan.report() | self.begun
        except sqlite3.Error as error:
            fix = "is the disk full? If not, remove it and build again"
            raise OSError(f"{self.state / 'plan.db'}: {error}; {fix}") from error
        write_json(self.output / REPORT_FILE, report)
        return report

    def _fill(self, plan: Plan) -> None:
        with plan.db:
            plan.clear(index=plan["begun"] != self.begun)
            plan["begun"] = self.begun
        try:
            if self.images:
                self.images.open(plan.index, self.state / "unpacked")
            self.fill(plan)
            self._check_lost(plan)
        except (ValueError, OSError):
            with plan.db:
                plan.clear(index=True)  # what is put right now is looked for again
            raise
        with plan.db:
            plan["planned"] = True

    def _check_lost(self, plan: Plan) -> None:
        """Raise ValueError if nothing is left, or more is lost than may be."""
        report, samples = plan.report(), len(plan)
        reasons = report["dropped"]
        listed, most = self.output / DROPPED_FILE, getattr(self.args, "max_missing", None)
        lost = {r: reasons[r] for r in (MISSING, AMBIGUOUS, UNDECODABLE) if r in reasons}
        total = samples + sum(lost.values()) - lost.get(UNDECODABLE, 0)
        if samples == lost.get(UNDECODABLE, 0):
            counts = _counts(reasons | report["skipped"]) or "the input lists none"
            fault = f"no sample could be kept ({counts})"
            fix = f"see {listed} and check the input and --images"
        elif most is not None and sum(lost.values()) > most(total):
            fault = f"{_counts(lost, ' and ')} of {total} images, listed in {listed}"
            again = "and build into a new folder, " if UNDECODABLE in lost else ""
            fix = f"put them in place {again}or allow it with --max-missing {sum(lost.values())}"
        else:
            return
        plan.write_dropped(self.output)
        raise ValueError(f"{fault}; {fix}")

    def _write_shards(self, plan: Plan) -> None:
        """Write the shards that are not there yet."""
        args = self.args
        order = plan.order(None if getattr(args, "no_shuffle", True) else args.seed)
        cuts = cut(len(order), args.shard_size, args.shards)
        if len(cuts) <= ENOUGH_SHARDS:
            need = "open_clip needs one for each data-loading worker of all GPUs together"
            fix = f"--shards {ENOUGH_SHARDS} makes {ENOUGH_SHARDS}"
            print(f"Shards: {len(cuts) - 1}, for {len(order)} samples. {need}; {fix}")
        done = self._done(plan)
        chunks = (
            [plan.sample(int(id)) for id in order[start : start + _CHUNK]]
            for start in range(done, len(order), _CHUNK)
        )
        results = ordered_map(partial(_read, resize=args.resize), chunks, args.workers)
        read = itertools.chain.from_iterable(results)
        bar = tqdm(read, "Writing shards", len(order), initial=done, unit="image")
        with contextlib.closing(results), bar:
            read = iter(bar)
            for start, end in itertools.pairwise(cuts):
                if start >= done:
                    self._write_shard(plan, end, itertools.islice(read, end - start))

    def _done(self, plan: Plan) -> int:
        """How far the shards go that are there; what came after a damaged one is done again."""
        done = 0
        shards = plan.db.execute("SELECT name, size, last FROM shards ORDER BY last")
        for name, size, last in shards:
            if size and not _is_there(self.output / name, size):
                break
            done = last
        with plan.db:
            for table in ("shards", "dropped"):
                plan.db.execute(f"DELETE FROM {table} WHERE last > ?", (done,))
        return done

    def _write_shard(self, plan: Plan, last: int, read: Iterator[tuple[Sample, str, Any]]) -> None:
        (number,) = plan.db.execute("SELECT COUNT(*) FROM shards WHERE samples").fetchone()
        path = self.output / self.shard_name.format(number)
        kept, gone = 0, []
        with contextlib.ExitStack() as stack:
            for sample, suffix, content in read:
                if isinstance(content, str):
                    gone.append((sample, suffix, content))
                    continue
                if not kept:  # a shard of no samples would leave a loader without any
                    path.parent.mkdir(exist_ok=True)
                    file = stack.enter_context(written_whole(path))
                    tar = stack.enter_context(tarfile.open(fileobj=file, mode="w"))
                label_suffix, label = self.encode(sample.payload)
                add_sample(tar, sample.key, {suffix: content, label_suffix: label})
                kept += 1
        with plan.db:
            for sample, reason, detail in gone:
                plan.drop(sample.name, reason, detail, last)
                plan.db.execute("UPDATE samples SET state = 'gone' WHERE id = ?", (sample.id,))
            row = str(path.relative_to(self.output)), kept, path.stat().st_size if kept else 0, last
            plan.db.execute("INSERT INTO shards VALUES (?, ?, ?, ?)", row)

    def _upload(self) -> None:
        """Move a complete build to its address, the report last."""
        system, root = tables.remote(self.shown)
        files = [p for p in self.output.rglob("*") if p.is_file() and STATE_FOLDER not in p.parts]
        files.sort(key=lambda path: (path.name == REPORT_FILE, path))
        for path in tqdm(files, "Uploading", unit="file"):
            target = f"{root.rstrip('/')}/{path.relative_to(self.output).as_posix()}"
            system.makedirs(os.path.dirname(target), exist_ok=True)
            system.put_file(str(path), target)
        shutil.rmtree(self.output)


def _counts(counts: dict[str, int], joint: str = ", ") -> str:
    return joint.join(f"{count} {reason}" for reason, count in counts.items())


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _read(samples: list[Sample], resize: int | None) -> list[tuple[Sample, str, bytes | str]]:
    """Each sample with (suffix, content) of its image, or (reason, detail)."""
    made: list[tuple[Sample, str, bytes | str]] = []
    for sample in samples:
        try:
            made.append((sample, *prepare(sources.read(sample.file), resize)))
        except FileNotFoundError as error:
            made.append((sample, MISSING, str(error.filename or error)))
        except SampleError as error:
            made.append((sample, UNDECODABLE, str(error).removeprefix("unreadable image: ")))
    return made


def cut(samples: int, shard_size: int, shards: int | None) -> list[int]:
    """Where shards begin, and the end: of ``shard_size`` samples, or ``shards`` of about equal size."""
    if shards is None:
        return [*range(0, samples, shard_size), samples]
    shards = min(shards, samples)
    return [n * samples // shards for n in range(shards + 1)]
