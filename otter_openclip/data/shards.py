"""The one writer of webdataset shards: many processes, the same bytes whatever their number, resumable.

A build first writes a *plan*, the list of its samples on disk, cut into shards by position before any
image is read. Each shard is written by one worker to a temporary name, synced and renamed, and its
report likewise, after it: a shard with a report is done. A build that is killed at any moment and
started again plans again or does the shards without report; none is written twice or left out.

Shards are kept in a hidden folder of the output until all are done. Then the empty ones are left out,
the others get their names (a loader wants them numbered without gaps), the files that say how many
there are follow, and ``report.json`` comes last: an output with it is complete.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tarfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from otter_openclip.data import sources
from otter_openclip.data.decoding import UndecodableImageError, prepare
from otter_openclip.data.pool import start_context, worker_pool
from otter_openclip.files import sync_folder, write_json, write_text, written_whole

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two builds off one folder there
    fcntl = None  # type: ignore[assignment]

STATE_FOLDER = ".otter-build"
REPORT_FILE = "report.json"
DROPPED_FILE = "dropped.tsv"
PLAN_VERSION = 1
MISSING, UNDECODABLE, DUPLICATE = "missing", "undecodable", "duplicate"
NOT_DOWNLOADED = "not downloaded"
_LOCK_SECONDS = 10.0
_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Build:
    """What to build, and how.

    Attributes:
        output: folder to write.
        command: subcommand's name, for messages and the report.
        settings: flag -> value (JSON), everything that decides the result; a resume must repeat it.
        inputs: files the result depends on; a resume must find them unchanged.
        encode: from a sample's payload to the suffix and content that go beside the image.
        shard_name: format of a shard's path in ``output``, from its number.
        shard_size: samples per shard before any is dropped.
        resize: longest that an image's shorter side may be, in pixels.
        seed: shuffles the samples before they are cut into shards; None keeps their order.
        workers: number of processes.
        max_missing: most images that may be missing or undecodable, given the number of samples; None is
            any number.
    """

    output: Path
    command: str
    settings: dict[str, Any]
    inputs: Sequence[Path]
    encode: Callable[[Any], tuple[str, bytes]]
    shard_name: str
    shard_size: int
    resize: int | None = None
    seed: int | None = None
    workers: int = 1
    max_missing: Callable[[int], int] | None = None


@dataclass(frozen=True)
class Sample:
    """A line of the plan.

    Attributes:
        key: webdataset key.
        name: what the user knows it by, for the report.
        locator: where the image is (`sources`).
        payload: caption or labels, JSON.
    """

    key: str
    name: str
    locator: sources.Locator
    payload: Any


@dataclass(frozen=True)
class Shard:
    """A finished shard: its path in the output, number of samples and bytes."""

    name: str
    samples: int
    size: int


@dataclass
class Result:
    """What a build came to. ``kept`` yields the samples in the source's order, before any shuffling."""

    shards: list[Shard]
    dropped: Counter[str]
    skipped: Counter[str]
    kept: Callable[[], Iterator[Sample]] = field(repr=False)

    @property
    def samples(self) -> int:
        """Number of samples written."""
        return sum(shard.samples for shard in self.shards)


class Planner:
    """Writes the plan to disk; what is kept in memory is 16 bytes a sample."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.archives: list[str] = []
        self.skipped: Counter[str] = Counter()
        self._plan: IO[bytes] = open(folder / "plan.jsonl", "wb")
        self._dropped: IO[str] = open(
            folder / "plan-dropped.tsv", "w", encoding="utf-8", newline=""
        )
        self._dropped_count: Counter[str] = Counter()
        self._offsets = array("q", [0])
        self._identities = array("Q")

    def __len__(self) -> int:
        return len(self._identities)

    def add(
        self,
        name: str,
        locator: sources.Locator,
        payload: Any,
        *,
        key: str | None = None,
        identity: str | None = None,
    ) -> None:
        """Append a sample.

        Args:
            name: what the user knows it by.
            locator: where its image is.
            payload: caption or labels.
            key: webdataset key; by default the sample's number.
            identity: of samples with the same one only the first is kept; by default ``key``.

        Raises:
            ValueError: if ``key`` has characters that webdataset's keys cannot have.
        """
        number = len(self)
        if key is None:
            key = f"{number:09d}"
        elif not _KEY.fullmatch(key):
            raise ValueError(
                f"{name}: {key!r} cannot be the key of a webdataset sample (letters, digits, - and _)"
            )
        line = json.dumps([key, name, locator, payload], ensure_ascii=False).encode() + b"\n"
        self._plan.write(line)
        self._offsets.append(self._offsets[-1] + len(line))
        self._identities.append(sources.digest(key if identity is None else identity))

    def drop(self, name: str, reason: str, detail: str = "") -> None:
        """List a sample in the report instead of writing it."""
        self._dropped_count[reason] += 1
        self._dropped.write(_row(name, reason, detail))

    def skip(self, reason: str, count: int = 1) -> None:
        """Count samples that do not belong to the result."""
        self.skipped[reason] += count

    def close(self, seed: int | None) -> tuple[int, Counter[str]]:
        """Remove duplicates, shuffle, save; returns the number of samples and what was dropped."""
        identities = np.frombuffer(self._identities, np.uint64)
        first = np.unique(identities, return_index=True)[1]
        order = np.sort(first)
        if len(order) < len(self):
            self._plan.flush()
            repeated = np.ones(len(self), bool)
            repeated[first] = False
            with PlanReader(self.folder, offsets=np.frombuffer(self._offsets, np.int64)) as plan:
                for number in np.flatnonzero(repeated):
                    self.drop(plan[int(number)].name, DUPLICATE)
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        for file in (self._plan, self._dropped):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for name, values in (("offsets", np.frombuffer(self._offsets, np.int64)), ("order", order)):
            with written_whole(self.folder / f"{name}.npy") as file:
                np.save(file, values)
        return len(order), self._dropped_count


class PlanReader:
    """Random access to the plan on disk."""

    def __init__(self, folder: Path, offsets: np.ndarray | None = None) -> None:
        self.offsets = np.load(folder / "offsets.npy", "r") if offsets is None else offsets
        self._file = open(folder / "plan.jsonl", "rb")

    def __enter__(self) -> PlanReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> Sample:
        start, end = int(self.offsets[number]), int(self.offsets[number + 1])
        return Sample(*json.loads(os.pread(self._file.fileno(), end - start, start)))


def run(
    build: Build,
    plan: Callable[[Planner], None],
    finish: Callable[[Path, Result], None],
) -> Result:
    """Build, or continue a build that was stopped, or see that it is complete.

    Args:
        build: what to build.
        plan: fills the plan; called again only if the last attempt did not finish it.
        finish: writes the small files of the data set; may be called again after a kill.

    Raises:
        ValueError: if ``build.output`` holds something else, a build with other settings or inputs, or
            nothing could be kept, or too many images are missing.
        RuntimeError: if another process builds there, or a worker was killed.
        OSError: if something cannot be read or written.
    """
    output = build.output
    state = output / STATE_FOLDER
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give --output a folder")
    if output.is_dir() and any(output.iterdir()) and not state.is_dir():
        raise ValueError(
            f"{output} holds files that are not of 'otter-openclip data'; choose another --output"
        )
    state.mkdir(parents=True, exist_ok=True)
    with _lock(state):
        manifest = _manifest(build, state, plan)
        if (output / REPORT_FILE).exists():
            return _complete(output, state, manifest)
        _check_missing(build, manifest, Counter(manifest["dropped"]))
        shards = _placed(state)
        if shards is None:
            _write_shards(build, state, manifest)
            shards = _collect(build, state, manifest)
        return _publish(build, state, manifest, shards, finish)


@contextlib.contextmanager
def _lock(state: Path) -> Iterator[None]:
    # Forked workers hold it too, so a restart waits until those of a killed run have gone.
    with open(state / "lock", "w") as file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"another process is building in {state.parent}; wait for it or end it"
                    ) from None
                time.sleep(0.1)
        yield


def _manifest(build: Build, state: Path, plan: Callable[[Planner], None]) -> dict[str, Any]:
    """The plan's description: checked against this command's, or written together with the plan."""
    path = state / "manifest.json"
    settings = {"command": build.command, **build.settings}
    inputs = {str(p): _stamp(p) for p in build.inputs}
    if path.exists():
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] != PLAN_VERSION:
            raise ValueError(
                f"{build.output} was begun by another version of otter-openclip; choose another --output"
            )
        _check_same(build.output, manifest, settings, inputs)
        return manifest
    for leftover in state.iterdir():
        if leftover.name not in ("lock", "unpacked"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    planner = Planner(state)
    plan(planner)
    samples, dropped = planner.close(build.seed)
    manifest = {
        "version": PLAN_VERSION,
        "settings": settings,
        "inputs": inputs,
        "archives": planner.archives,
        "samples": samples,
        "dropped": dict(sorted(dropped.items())),
        "skipped": dict(sorted(planner.skipped.items())),
    }
    if samples == 0:
        _write_dropped(build.output, state, [])
        raise ValueError(_nothing(build, Counter(dropped), planner.skipped))
    # Before the manifest, so that images put in place since are looked for again.
    _check_missing(build, manifest, dropped)
    (state / "shards").mkdir()
    write_json(path, manifest)
    return manifest


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _check_same(
    output: Path, manifest: dict[str, Any], settings: dict[str, Any], inputs: dict[str, list[int]]
) -> None:
    settings = json.loads(json.dumps(settings))
    differences = []
    for name in dict.fromkeys([*manifest["settings"], *settings]):
        before, now = manifest["settings"].get(name), settings.get(name)
        if before != now:
            flag = name if name == "command" else f"--{name}"
            differences.append(f"{flag} was {_shown(before)} and is now {_shown(now)}")
    for name in dict.fromkeys([*manifest["inputs"], *inputs]):
        before, now = manifest["inputs"].get(name), inputs.get(name)
        if now is None:
            differences.append(f"{name} was an input and is none now")
        elif before is None:
            differences.append(f"{name} is new among the inputs")
        elif before != now:
            differences.append(f"{name} has changed (size {before[0]}, now {now[0]}; or its date)")
    if differences:
        raise ValueError(
            f"{output} was begun differently: {'; '.join(differences[:5])}. "
            "Run it as it was begun, or choose another --output"
        )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "not given" if value is None else str(value)


def _check_missing(build: Build, manifest: dict[str, Any], dropped: Counter[str]) -> None:
    if build.max_missing is None:
        return
    counts = {reason: dropped[reason] for reason in (MISSING, UNDECODABLE) if dropped[reason]}
    lost = sum(counts.values())
    total = manifest["samples"] + manifest["dropped"].get(MISSING, 0)
    if lost > build.max_missing(total):
        state = build.output / STATE_FOLDER
        _write_dropped(build.output, state, _reports(state, manifest, build.shard_size))
        shown = " and ".join(f"{count} {reason}" for reason, count in counts.items())
        raise ValueError(
            f"{shown} of {total} images, listed in {build.output / DROPPED_FILE}; put them in place "
            + ("and build into a new folder, " if counts.get(UNDECODABLE) else "")
            + f"or allow it with --max-missing {lost}"
        )


def _write_shards(build: Build, state: Path, manifest: dict[str, Any]) -> None:
    """Write the shards that have no report yet."""
    count = -(-manifest["samples"] // build.shard_size)
    todo = [n for n in range(count) if _report(state, n) is None]
    workers = min(build.workers, len(todo))
    done = manifest["samples"] - sum(
        len(_positions(n, build.shard_size, manifest["samples"])) for n in todo
    )
    context = start_context()
    progress, stop = context.Value("q", done), context.Value("b", 0, lock=False)
    arguments = (build, manifest, progress, stop)
    bar = tqdm(total=manifest["samples"], initial=done, desc="Writing shards", unit="image")
    with bar:
        if workers <= 1:
            _begin(*arguments)
            for number in todo:
                _write_shard(number, bar)
        else:
            _run_pool(workers, todo, arguments, bar)


def _run_pool(workers: int, todo: list[int], arguments: tuple[Any, ...], bar: tqdm) -> None:
    progress, stop = arguments[2:]
    with worker_pool(workers, _begin, arguments) as pool:
        try:
            pending = {pool.submit(_write_shard, number) for number in todo}
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(progress.value - bar.n)
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process was killed (out of memory?); the finished shards are kept, and the "
                "same command goes on from there, with fewer --workers if you like"
            ) from None
        finally:
            stop.value = 1


_worker: tuple[Build, Path, PlanReader, np.ndarray, list[str], Any, Any]


def _begin(build: Build, manifest: dict[str, Any], progress: Any, stop: Any) -> None:
    global _worker
    state = build.output / STATE_FOLDER
    order = np.load(state / "order.npy", "r")
    _worker = build, state, PlanReader(state), order, manifest["archives"], progress, stop


def _positions(number: int, shard_size: int, samples: int) -> range:
    return range(number * shard_size, min((number + 1) * shard_size, samples))


def _write_shard(number: int, bar: tqdm | None = None) -> None:
    build, state, plan, order, archives, progress, stop = _worker
    path = state / "shards" / f"{number}.tar"
    dropped, kept = [], 0
    with written_whole(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for position in _positions(number, build.shard_size, len(order)):
            if stop.value:
                raise RuntimeError("stopped")
            index = int(order[position])
            sample = plan[index]
            try:
                suffix, image = prepare(sources.read(sample.locator, archives), build.resize)
            except FileNotFoundError as error:
                dropped.append([index, sample.name, MISSING, str(error)])
            except UndecodableImageError as error:
                dropped.append([index, sample.name, UNDECODABLE, str(error)])
            else:
                _add(tar, f"{sample.key}.{suffix}", image)
                label_suffix, label = build.encode(sample.payload)
                _add(tar, f"{sample.key}.{label_suffix}", label)
                kept += 1
            if bar is None:
                with progress.get_lock():
                    progress.value += 1
            else:
                bar.update()
    report = {"samples": kept, "size": path.stat().st_size, "dropped": dropped}
    write_json(state / "shards" / f"{number}.json", report)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no owner, no date: the same bytes every time
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _report(state: Path, number: int) -> dict[str, Any] | None:
    """A shard's report if the shard is done and whole."""
    try:
        report = json.loads((state / "shards" / f"{number}.json").read_text(encoding="utf-8"))
        size = (state / "shards" / f"{number}.tar").stat().st_size
    except (FileNotFoundError, ValueError):
        return None
    return report if size == report["size"] else None


def _reports(
    state: Path, manifest: dict[str, Any], shard_size: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, report) of the finished shards, one at a time: together they may be large."""
    for number in range(-(-manifest["samples"] // shard_size)):
        report = _report(state, number)
        if report is not None:
            yield number, report


def _placed(state: Path) -> dict[str, Any] | None:
    """The list of final shards, once all are written; from then on they are only renamed."""
    path = state / "shards.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _collect(build: Build, state: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    dropped, indices, full = Counter(manifest["dropped"]), [], []
    for number, report in _reports(state, manifest, build.shard_size):
        dropped.update(reason for _, _, reason, _ in report["dropped"])
        indices += [index for index, *_ in report["dropped"]]
        if report["samples"]:
            name = build.shard_name.format(len(full))
            full.append([number, name, report["samples"], report["size"]])
    _check_missing(build, manifest, dropped)
    _write_dropped(build.output, state, _reports(state, manifest, build.shard_size))
    if not full:
        raise ValueError(_nothing(build, dropped, Counter(manifest["skipped"])))
    shards = {
        "dropped": dict(sorted(dropped.items())),
        "dropped_indices": sorted(indices),
        "shards": full,
    }
    write_json(state / "shards.json", shards)
    return shards


def _nothing(build: Build, dropped: Counter[str], skipped: Counter[str]) -> str:
    counts = ", ".join(f"{count} {reason}" for reason, count in (dropped + skipped).items())
    return (
        f"no sample could be kept ({counts or 'the input lists none'}); see "
        f"{build.output / DROPPED_FILE} and check the input and --images"
    )


def _publish(
    build: Build,
    state: Path,
    manifest: dict[str, Any],
    placed: dict[str, Any],
    finish: Callable[[Path, Result], None],
) -> Result:
    for number, name, _, size in placed["shards"]:
        source, target = state / "shards" / f"{number}.tar", build.output / name
        target.parent.mkdir(exist_ok=True)
        if source.exists():
            os.replace(source, target)
        _check_shard(target, size)
    for folder in {(build.output / name).parent for _, name, _, _ in placed["shards"]}:
        sync_folder(folder)

    def kept() -> Iterator[Sample]:
        gone = set(placed["dropped_indices"])
        with PlanReader(state) as plan:
            for index in np.sort(np.load(state / "order.npy")):
                if int(index) not in gone:
                    yield plan[int(index)]

    result = _result(manifest, placed, kept)
    finish(build.output, result)
    report = {
        "samples": result.samples,
        "shards": len(result.shards),
        "dropped": placed["dropped"],
        "skipped": manifest["skipped"],
        "settings": manifest["settings"],
    }
    write_json(build.output / REPORT_FILE, report)
    _clean(state)
    return result


def _result(
    manifest: dict[str, Any], placed: dict[str, Any], kept: Callable[[], Iterator[Sample]]
) -> Result:
    shards = [Shard(name, samples, size) for _, name, samples, size in placed["shards"]]
    return Result(shards, Counter(placed["dropped"]), Counter(manifest["skipped"]), kept)


def _complete(output: Path, state: Path, manifest: dict[str, Any]) -> Result:
    placed = _placed(state)
    if placed is None:
        raise ValueError(f"{state / 'shards.json'} is gone; build into a new folder")
    for _, name, _, size in placed["shards"]:
        _check_shard(output / name, size)
    _clean(state)
    return _result(manifest, placed, lambda: iter(()))


def _check_shard(path: Path, size: int) -> None:
    if not path.exists() or path.stat().st_size != size:
        raise ValueError(
            f"{path} is gone or is not the shard of {size} bytes that was written; "
            "build into a new folder"
        )


def _clean(state: Path) -> None:
    for name in ("shards", "unpacked"):
        shutil.rmtree(state / name, ignore_errors=True)
    for name in ("plan.jsonl", "plan-dropped.tsv", "offsets.npy", "order.npy"):
        (state / name).unlink(missing_ok=True)


def _write_dropped(
    output: Path, state: Path, reports: Iterable[tuple[int, dict[str, Any]]]
) -> None:
    planned = state / "plan-dropped.tsv"
    with written_whole(output / DROPPED_FILE, "w") as file:
        file.write("sample\treason\tdetail\n")
        if planned.exists():
            with open(planned, encoding="utf-8", newline="") as before:
                shutil.copyfileobj(before, file)
        for _, report in reports:
            for _, *row in report["dropped"]:
                file.write(_row(*row))


def _row(name: str, reason: str, detail: str) -> str:
    return "\t".join(" ".join(text.split()) for text in (name, reason, detail)) + "\n"


def write_sizes(output: Path, result: Result) -> None:
    """Write ``sizes.json``, from which open_clip reads the number of samples."""
    write_json(output / "sizes.json", {shard.name: shard.samples for shard in result.shards})


def write_shard_count(output: Path, result: Result) -> None:
    """Write ``nshards.txt``, from which clip_benchmark reads the number of shards."""
    folder = (output / result.shards[0].name).parent
    write_text(folder / "nshards.txt", f"{len(result.shards)}\n")
