"""Shards from a plan of their samples: the same bytes for any number of workers, after any kill.

A builder lists its rows in the plan, an SQLite file in OUT/.otter-build, with where each row's image is.
The plan is cut into shards before any image is read, and notes how far the finished shards go. Threads
read images; one of them writes the shards, in order. ``report.json`` comes last: an output with it is
complete.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from otter_openclip.cli import positive
from otter_openclip.data import sources
from otter_openclip.data.decoding import prepare
from otter_openclip.data.lookup import AMBIGUOUS, MISSING, Downloaded, Paths
from otter_openclip.data.plan import DROPPED_FILE, Plan, Sample
from otter_openclip.data.pool import default_workers, ordered_map
from otter_openclip.data.sources import absolute
from otter_openclip.files import write_json
from otter_openclip.shards.read import SampleError
from otter_openclip.shards.write import write_shard

STATE_FOLDER, REPORT_FILE, UNDECODABLE = ".otter-build", "report.json", "undecodable"
_LOCK_SECONDS = 10.0
_CHUNK = 16  # images a worker reads at a time
_NOT_OF_THE_RESULT = ("output", "workers", "max_missing")  # options that a resume may change


def add_output(parser: argparse.ArgumentParser, *, shard_size: int) -> None:
    """Add the options that all builders have."""
    parser.set_defaults(command=parser.prog.split()[-1])
    group = parser.add_argument_group("output")
    add, one = group.add_argument, group.add_mutually_exclusive_group().add_argument
    text = "folder to write; the same command goes on with a build that was stopped"
    add("--output", required=True, type=absolute, metavar="DIR", help=text)
    text = "scale images down to this shorter side (JPEG quality 95); default: files as they are"
    add("--resize", type=positive, metavar="PIXELS", help=text)
    text = f"samples per shard; default {shard_size}"
    one("--shard-size", type=positive, default=shard_size, metavar="N", help=text)
    text = "number of shards instead; open_clip needs one for each data-loading worker of all GPUs"
    one("--shards", type=positive, metavar="N", help=text)
    text = "threads; default: one per CPU. The result does not depend on it"
    add("--workers", type=positive, default=default_workers(), metavar="N", help=text)


@dataclass
class Build:
    """What to build, and how; `run` does it."""

    args: argparse.Namespace  # the command and its options, with those of `add_output`
    inputs: Sequence[str]  # files that the result depends on, beside the archives of ``images``
    images: Paths | Downloaded | None  # opened before the plan is filled
    fill: Callable[[Plan], None]
    finish: Callable[[Path, Plan], None]  # writes the small files of the data set
    suffix: str  # of the file beside an image
    encode: Callable[[str], bytes]  # from a sample's text in the plan to that file's content
    shard_name: str  # format, from the shard's number
    record: str  # what a name stands for: "row" if it is the picture's path, or URL, photo, image

    def __post_init__(self) -> None:
        self.output = Path(self.args.output)
        self.state = self.output / STATE_FOLDER
        # What a resume must repeat: the options, and the files' sizes and times.
        self.begun = {
            f"--{name.replace('_', '-')}": " ".join(value) if isinstance(value, list) else value
            for name, value in vars(self.args).items()
            if name not in _NOT_OF_THE_RESULT and value is not None and value is not False
        }
        self.wrong = getattr(self.args, "drop_wrong", None)  # of training builders
        archives = self.images.archives if self.images else ()
        inputs = [*self.inputs, *archives, *([self.wrong] if self.wrong else [])]
        self.begun |= {path: sources.stamp(path) for path in inputs}

    def run(self) -> dict[str, Any]:
        """Build, or go on with a build that was stopped, or see that it is complete; the report.

        ValueError if the output holds something else or a build with other settings or inputs, nothing
        could be kept, or too many pictures are missing; RuntimeError if another process builds there;
        OSError if something cannot be read or written.
        """
        if self.output.exists() and not self.state.is_dir() and any(self.output.iterdir()):
            fault = "holds files that are not of 'otter-openclip data'"
            raise ValueError(f"{self.output} {fault}; choose another --output")
        self.state.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.state / "lock", timeout=_LOCK_SECONDS):
                report = self._complete() or self._build()
                for path in self.state.glob("*.db*"):
                    path.unlink()
                shutil.rmtree(self.state / "unpacked", ignore_errors=True)
        except Timeout:
            fault = f"another process is building in {self.output}; wait for it or end it"
            raise RuntimeError(fault) from None
        print(f"{self.output}: {report['samples']} samples, {report['shards']} shards.")
        if report["skipped"]:
            print(f"Left out: {_counts(report['skipped'])}.")
        if report["dropped"]:
            print(f"Dropped: {_counts(report['dropped'])}; see {self.output / DROPPED_FILE}")
        return report

    def _check_same(self, before: Mapping[str, Any]) -> None:
        """Raise ValueError if settings or inputs are not those that the build was begun with."""
        names = [n for n in before | self.begun if before.get(n) != self.begun.get(n)]
        if names:
            was = "; ".join(f"{name} was {before.get(name, 'not given')}" for name in names)
            fix = "run it as it was begun, or choose another --output"
            raise ValueError(f"{self.output} was begun differently ({was}); {fix}")

    def _complete(self) -> dict[str, Any] | None:
        """The report of a build that is complete."""
        path = self.output / REPORT_FILE
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if report:
            self._check_same(report.get("begun", {}))
            for name, _, size in report["written"]:
                if not _is_there(shard := self.output / name, size):
                    raise ValueError(f"{shard} is not as it was written; build into a new folder")
        return report

    def _build(self) -> dict[str, Any]:
        path = self.state / "plan.db"
        try:
            if not path.exists():
                self._make_plan(path)
            plan = Plan(path, self.record)
            with contextlib.closing(plan.db):
                self._check_same(plan.begun)
                self._write_shards(plan)
                self._check_lost(plan)
                plan.write_dropped(self.output)
                self.finish(self.output, plan)
                report = plan.report()
        except sqlite3.Error as error:
            fix = "is the disk full? If not, remove it and build again"
            raise OSError(f"{path}: {error}; {fix}") from error
        write_json(self.output / REPORT_FILE, report)
        return report

    def _make_plan(self, path: Path) -> None:
        """List all samples; what a kill or an error leaves of an unfinished plan is not used."""
        for unfinished in self.state.glob("unfinished.db*"):
            unfinished.unlink()
        plan = Plan(self.state / "unfinished.db", self.record)
        with contextlib.closing(plan.db), plan.db:
            if self.images:
                self.images.open(plan.index, self.state / "unpacked")
            self.fill(plan)
            plan.drop_shared()
            if self.wrong:
                plan.drop_keys(read_wrong(self.wrong), "looks wrong")
            plan.db.execute("INSERT INTO begun VALUES (?)", (json.dumps(self.begun),))
            self._check_lost(plan)
        os.replace(self.state / "unfinished.db", path)

    def _check_lost(self, plan: Plan) -> None:
        """Raise ValueError if nothing is left, or more is lost than may be."""
        reasons = plan.report()["dropped"]
        lost = {r: reasons[r] for r in (MISSING, AMBIGUOUS, UNDECODABLE) if r in reasons}
        most = getattr(self.args, "max_missing", None)
        listed = self.output / DROPPED_FILE
        if next(plan.written(), None) is None:
            counts = _counts(reasons | plan.report()["skipped"]) or "the input lists none"
            check = "input and --images" if hasattr(self.args, "images") else "the input"
            fault = f"no sample could be kept ({counts}); check {check}, see {listed}"
        elif most is not None and sum(lost.values()) > most:
            again = " and build into a new folder" if UNDECODABLE in lost else ""
            fix = f"put them in place{again}, or pass --max-missing {sum(lost.values())}"
            fault = f"{_counts(lost)} images, listed in {listed}; {fix}"
        else:
            return
        plan.write_dropped(self.output)
        raise ValueError(fault)

    def _write_shards(self, plan: Plan) -> None:
        """Write the shards that are not there yet."""
        args = self.args
        order = plan.order(None if getattr(args, "no_shuffle", True) else args.seed)
        cuts = cut(len(order), args.shard_size, args.shards)
        done = self._done(plan)
        chunks = (
            [plan.sample(int(id)) for id in order[start : start + _CHUNK]]
            for start in range(done, len(order), _CHUNK)
        )
        results = ordered_map(partial(_read, resize=args.resize), chunks, args.workers)
        images = itertools.chain.from_iterable(results)
        bar = tqdm(images, "Writing shards", len(order), initial=done, unit="image")
        with contextlib.closing(results), bar:
            images = iter(bar)
            for start, end in itertools.pairwise(cuts):
                if start >= done:
                    self._write_shard(plan, end, itertools.islice(images, end - start))

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

    def _write_shard(self, plan: Plan, last: int, images: Iterator[Image]) -> None:
        """Write the samples whose image could be read, if there are any, and note the others."""
        (number,) = plan.db.execute("SELECT COUNT(*) FROM shards WHERE samples").fetchone()
        path = self.output / self.shard_name.format(number)
        lost: list[Image] = []

        def readable() -> Iterator[tuple[str, dict[str, bytes]]]:
            for image in images:
                sample, suffix, content = image
                if isinstance(content, bytes):
                    yield sample.key, {suffix: content, self.suffix: self.encode(sample.text)}
                else:
                    lost.append(image)

        samples, count = readable(), 0
        if first := next(samples, None):  # a shard of no samples would leave a loader without any
            path.parent.mkdir(exist_ok=True)
            count = write_shard(path, itertools.chain([first], samples))
        with plan.db:
            for sample, reason, detail in lost:
                plan.drop(sample.name, reason, detail, id=sample.id, last=last)
            size = path.stat().st_size if count else 0
            row = str(path.relative_to(self.output)), count, size, last
            plan.db.execute("INSERT INTO shards VALUES (?, ?, ?, ?)", row)


# A sample with its image's suffix and content, or with the reason and the detail for having none.
Image = tuple[Sample, str, bytes | str]


def _read(samples: list[Sample], resize: int | None) -> list[Image]:
    images: list[Image] = []
    for sample in samples:
        try:
            images.append((sample, *prepare(sources.read(sample.file), resize)))
        except FileNotFoundError as error:
            images.append((sample, MISSING, str(error.filename or error)))
        except SampleError as error:
            images.append((sample, UNDECODABLE, str(error).removeprefix("unreadable image: ")))
    return images


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def read_wrong(path: str) -> list[str]:
    """The keys of the pairs that ``fit`` found to look wrong, of its fit.json.

    ValueError if the file is none, or lists pairs of several folders, whose keys may be alike.
    """
    try:
        wrong = json.loads(Path(path).read_text(encoding="utf-8"))["wrong"]
        folders = {str(Path(pair["shard"]).parent) for pair in wrong}
        keys = [str(pair["key"]) for pair in wrong]
    except (ValueError, KeyError, TypeError) as error:
        fix = "give the fit.json of otter-openclip fit, without --no-weights"
        raise ValueError(f"--drop-wrong {path} lists no pairs ({error}); {fix}") from error
    if len(folders) > 1:
        listed = " and ".join(sorted(folders)[:2])
        fix = "fit to the shards of one build"
        raise ValueError(f"--drop-wrong {path} lists pairs of {listed}; {fix}")
    return keys


def cut(samples: int, shard_size: int, shards: int | None) -> list[int]:
    """Where shards begin, and the end: of ``shard_size`` samples, or ``shards`` of about equal size."""
    if shards is None:
        return [*range(0, samples, shard_size), samples]
    shards = min(shards, samples)
    return [n * samples // shards for n in range(shards + 1)]
