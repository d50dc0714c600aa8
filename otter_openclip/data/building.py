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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from otter_openclip.data import sources
from otter_openclip.data.decoding import UndecodableImageError, prepare
from otter_openclip.data.lookup import AMBIGUOUS, MISSING
from otter_openclip.data.plan import DROPPED_FILE, Plan, Sample
from otter_openclip.data.pool import ordered_map
from otter_openclip.files import write_json, written_whole

STATE_FOLDER, REPORT_FILE, UNDECODABLE = ".otter-build", "report.json", "undecodable"
ENOUGH_SHARDS = 8
_LOCK_SECONDS = 10.0
_CHUNK = 16  # images a worker reads at a time


@dataclass(frozen=True)
class Build:
    """What to build, and how."""

    args: argparse.Namespace  # command, and the options of `options.add_output`
    settings: dict[str, Any]  # the command's own that decide the result, by flag
    inputs: Sequence[str]  # files that the result depends on
    encode: Callable[[Any], tuple[str, bytes]]  # a payload's suffix and content
    shard_name: str  # format, from the shard's number
    record: str  # what a name stands for: "row" if it is the picture's path, or URL, photo, image
    seed: int | None = None  # of the samples' order; None keeps it
    max_missing: Callable[[int], int] | None = None  # most pictures that may be lost, of so many

    @property
    def output(self) -> Path:
        """The folder to write; that of an address is uploaded in the end."""
        if "://" not in self.args.output:
            return Path(os.path.abspath(self.args.output))
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Path(cache, "otter-openclip", sources.digest(self.args.output).hex())

    @property
    def shown(self) -> str:
        """The output for messages: a whole path, or the address."""
        return sources.absolute(self.args.output)

    def begun(self) -> dict[str, Any]:
        """What a resume must repeat: settings by flag, and inputs with their state."""
        args = self.args
        settings = {"command": args.command, **self.settings, "resize": args.resize}
        for flag in ("images", "img2dataset"):
            paths = getattr(args, flag, None)
            settings[flag] = paths and " ".join(map(sources.absolute, paths))
        settings |= {"shards": args.shards} if args.shards else {"shard-size": args.shard_size}
        settings["seed"] = self.seed
        inputs = {path: sources.stamp(path) for path in self.inputs}
        return json.loads(json.dumps({"settings": settings, "inputs": inputs}))


def run(
    build: Build, fill: Callable[[Plan], None], finish: Callable[[Path, Plan], None]
) -> dict[str, Any]:
    """Build, or go on with a build that was stopped, or see that it is complete; returns the report.

    ``fill`` fills the plan, again if the last attempt did not finish it; ``finish`` writes the small
    files of the data set.

    Raises:
        ValueError: if ``build.output`` holds something else or a build with other settings or inputs,
            nothing could be kept, or too many pictures are missing.
        RuntimeError: if another process builds there, or a worker was killed.
        OSError: if something cannot be read or written.
    """
    output, state = build.output, build.output / STATE_FOLDER
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give --output a folder")
    if output.is_dir() and any(output.iterdir()) and not state.is_dir():
        fault = "holds files that are not of 'otter-openclip data'"
        raise ValueError(f"{output} {fault}; choose another --output")
    begun = build.begun()
    if output != Path(build.shown) and (report := _uploaded(build.shown)):
        _check_same(build.shown, report, begun)
        return report
    state.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(state / "lock").acquire(timeout=_LOCK_SECONDS)
    except Timeout:
        fault = f"another process is building in {output}; wait for it or end it"
        raise RuntimeError(fault) from None
    with lock:
        if (output / REPORT_FILE).exists():
            report = _complete(output, begun)
        else:
            with _plan(state, build.record, begun) as plan:
                if not plan["planned"]:
                    _fill(plan, build, fill)
                _check_lost(plan, build)
                _write_shards(plan, build)
                _check_lost(plan, build)
                plan.write_dropped(output)
                finish(output, plan)
                report = plan.report() | begun
                write_json(output / REPORT_FILE, report)
        _remove_plan(state)
        shutil.rmtree(state / "unpacked", ignore_errors=True)
        if output != Path(build.shown):
            _upload(output, build.shown)
    return report


@contextlib.contextmanager
def _plan(state: Path, record: str, begun: dict[str, Any]) -> Iterator[Plan]:
    """The plan that is there, or a new one; OSError if it cannot be read or written."""
    try:
        plan = Plan(state, record)
        if plan["planned"]:
            _check_same(state.parent, plan["begun"], begun)
        elif plan["begun"] not in (None, begun):
            plan.db.close()
            _remove_plan(state)
            plan = Plan(state, record)
        with plan.db:
            plan["begun"] = begun
        with contextlib.closing(plan.db):
            yield plan
    except sqlite3.Error as error:
        fix = "is the disk full? If not, remove it and build again"
        raise OSError(f"{state / 'plan.db'}: {error}; {fix}") from error


def _fill(plan: Plan, build: Build, fill: Callable[[Plan], None]) -> None:
    with plan.db:
        for table in ("samples", "dropped", "skipped"):  # of a plan that was not finished
            plan.db.execute(f"DELETE FROM {table}")
    try:
        fill(plan)
        plan.db.commit()
        _check_lost(plan, build)
    except (ValueError, OSError):
        plan.db.close()
        _remove_plan(plan.folder)  # what is put right now is looked for again
        raise
    with plan.db:
        plan["planned"] = True


def _check_same(where: Path | str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError if settings or inputs are not those that the build was begun with."""
    differences = []
    for kind in now:
        for name in before[kind] | now[kind]:
            old, new = (values[kind].get(name) for values in (before, now))
            if old != new and kind == "inputs":
                differences.append(f"{name} has changed")
            elif old != new:
                old, new = ("not given" if value is None else value for value in (old, new))
                flag = name if name == "command" else f"--{name}"
                differences.append(f"{flag} was {old} and is now {new}")
    if differences:
        fix = "Run it as it was begun, or choose another --output"
        raise ValueError(f"{where} was begun differently: {'; '.join(differences[:5])}. {fix}")


def _check_lost(plan: Plan, build: Build) -> None:
    """Raise ValueError if nothing is left, or more is lost than may be."""
    report, samples = plan.report(), len(plan)
    reasons = report["dropped"]
    listed = build.output / DROPPED_FILE
    lost = {r: reasons[r] for r in (MISSING, AMBIGUOUS, UNDECODABLE) if r in reasons}
    total = samples + sum(lost.values()) - lost.get(UNDECODABLE, 0)
    if samples == lost.get(UNDECODABLE, 0):
        counts = ", ".join(f"{n} {reason}" for reason, n in (reasons | report["skipped"]).items())
        fault = f"no sample could be kept ({counts or 'the input lists none'})"
        fix = f"see {listed} and check the input and --images"
    elif build.max_missing is not None and sum(lost.values()) > build.max_missing(total):
        counts = " and ".join(f"{count} {reason}" for reason, count in lost.items())
        fault = f"{counts} of {total} images, listed in {listed}"
        again = "and build into a new folder, " if UNDECODABLE in lost else ""
        fix = f"put them in place {again}or allow it with --max-missing {sum(lost.values())}"
    else:
        return
    plan.write_dropped(build.output)
    raise ValueError(f"{fault}; {fix}")


def _write_shards(plan: Plan, build: Build) -> None:
    """Write the shards that are not there yet."""
    order = plan.order(build.seed)
    cuts = cut(len(order), build.args.shard_size, build.args.shards)
    if len(cuts) <= ENOUGH_SHARDS:
        print(
            f"Shards: {len(cuts) - 1}, for {len(order)} samples. open_clip needs one for each data-"
            f"loading worker of all GPUs together; --shards {ENOUGH_SHARDS} makes {ENOUGH_SHARDS}"
        )
    done = _whole(plan, build.output)
    chunks: deque[list[Sample]] = deque()

    def jobs() -> Iterator[tuple[list[list[Any]], int | None]]:
        for start in range(done, len(order), _CHUNK):
            chunks.append([plan.sample(int(id)) for id in order[start : start + _CHUNK]])
            yield [sample.file for sample in chunks[-1]], build.args.resize

    results = ordered_map(_read, jobs(), build.args.workers)
    read = (pair for made in results for pair in zip(chunks.popleft(), made, strict=True))
    bar = tqdm(total=len(order), initial=done, desc="Writing shards", unit="image")
    with contextlib.closing(results), bar:
        for start, end in itertools.pairwise(cuts):
            if start >= done:
                _write_shard(plan, build, end, (next(read) for _ in range(start, end)), bar)


def _whole(plan: Plan, output: Path) -> int:
    """How far the shards go that are there; what came after a damaged one is done again."""
    done = 0
    for name, size, last in plan.db.execute("SELECT name, size, last FROM shards ORDER BY last"):
        if size and not ((output / name).is_file() and (output / name).stat().st_size == size):
            break
        done = last
    with plan.db:
        for table in ("shards", "dropped"):
            plan.db.execute(f"DELETE FROM {table} WHERE last > ?", (done,))
    return done


def _read(job: tuple[list[list[Any]], int | None]) -> list[tuple[str, bytes | str]]:
    """(suffix, content) of each image, or (reason, detail)."""
    files, resize = job
    made: list[tuple[str, bytes | str]] = []
    for file in files:
        try:
            made.append(prepare(sources.read(file), resize))
        except FileNotFoundError as error:
            made.append((MISSING, str(error.filename or error)))
        except UndecodableImageError as error:
            made.append((UNDECODABLE, str(error)))
    return made


def _write_shard(
    plan: Plan, build: Build, last: int, read: Iterator[tuple[Sample, Any]], bar: tqdm
) -> None:
    (number,) = plan.db.execute("SELECT COUNT(*) FROM shards WHERE samples").fetchone()
    path = build.output / build.shard_name.format(number)
    kept, gone = 0, []
    with contextlib.ExitStack() as stack:
        for sample, (suffix, content) in read:
            bar.update()
            if isinstance(content, str):
                gone.append((sample, suffix, content))
                continue
            if not kept:  # a shard of no samples would leave a loader without any
                path.parent.mkdir(exist_ok=True)
                file = stack.enter_context(written_whole(path))
                tar = stack.enter_context(tarfile.open(fileobj=file, mode="w"))
            label_suffix, label = build.encode(sample.payload)
            sources.add_sample(tar, sample.key, {suffix: content, label_suffix: label})
            kept += 1
    with plan.db:
        for sample, reason, detail in gone:
            plan.drop(sample.name, reason, detail, last)
            plan.db.execute("UPDATE samples SET state = 'gone' WHERE id = ?", (sample.id,))
        row = str(path.relative_to(build.output)), kept, path.stat().st_size if kept else 0, last
        plan.db.execute("INSERT INTO shards VALUES (?, ?, ?, ?)", row)


def cut(samples: int, shard_size: int, shards: int | None) -> list[int]:
    """Where shards begin, and the end: of ``shard_size`` samples, or ``shards`` of about equal size."""
    if shards is None:
        return [*range(0, samples, shard_size), samples]
    shards = min(shards, samples)
    return [n * samples // shards for n in range(shards + 1)]


def _complete(output: Path, begun: dict[str, Any]) -> dict[str, Any]:
    report = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))
    if "written" not in report:
        raise ValueError(f"{output} is of an earlier version; choose another --output")
    _check_same(output, report, begun)
    for name, _, size in report["written"]:
        path = output / name
        if not path.exists() or path.stat().st_size != size:
            fault = f"is gone or is not the shard of {size} bytes that was written"
            raise ValueError(f"{path} {fault}; build into a new folder")
    return report


def _uploaded(address: str) -> dict[str, Any] | None:
    """The report of a build that is complete at an address."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads(sources.read([f"{address}/{REPORT_FILE}"]))
    return None


def _upload(folder: Path, address: str) -> None:
    """Move a complete build to an address, the report last."""
    import fsspec

    system, root = fsspec.core.url_to_fs(address)
    files = [p for p in folder.rglob("*") if p.is_file() and STATE_FOLDER not in p.parts]
    files.sort(key=lambda path: (path.name == REPORT_FILE, path))
    for path in tqdm(files, "Uploading", unit="file"):
        target = f"{root.rstrip('/')}/{path.relative_to(folder).as_posix()}"
        system.makedirs(os.path.dirname(target), exist_ok=True)
        system.put_file(str(path), target)
    shutil.rmtree(folder)


def _remove_plan(state: Path) -> None:
    for path in state.glob("plan.db*"):
        path.unlink()
