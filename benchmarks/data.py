"""`otter-openclip data csv`: samples per second and memory, from a folder, a tar and a zip.

Beside it, in the same run and in turn: plain loops over the same files that write with webdataset, and
img2dataset's writer fed from them. With N workers the loops are N processes that share the shards. All
are processes of their own, timed with their start (give it many images). What is yet to be written to
disk is waited for before each.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks import common, processes
from otter_openclip.data import lookup
from otter_openclip.files import write_json

_PICTURES = 300
_SHARDS = 10
_LARGEST_SHARD = 10_000
_LOOK_UPS = 100_000
_LOOK_SECONDS = 0.2  # at memory; peaks are kept by the system, and looking costs the builds time


def pictures(count: int) -> list[bytes]:
    """JPEGs of 10 to 30 kB, of photographs' sizes and about their detail."""
    found = []
    for seed in tqdm(range(count), "Drawing pictures", leave=False):
        rng = np.random.default_rng(seed)
        size = (int(rng.integers(320, 449)), int(rng.integers(256, 385)))
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        grain = rng.normal(0, 3, (*smooth.shape[:2], 1)).round().astype(np.int16)
        buffer = io.BytesIO()
        picture = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
        picture.save(buffer, "JPEG", quality=int(rng.integers(50, 81)))
        found.append(buffer.getvalue())
    return found


def commented(content: bytes, text: str) -> bytes:
    """The JPEG with a comment: other bytes, the same picture."""
    comment = text.encode()
    length = (len(comment) + 2).to_bytes(2, "big")
    return content[:2] + b"\xff\xfe" + length + comment + content[2:]


def make(folder: Path, images: int) -> int:
    """Write table.tsv, the folder ``folder``, and its files as all.tar and all.zip; bytes of images."""
    drawn, rng, total = pictures(min(_PICTURES, images)), random.Random(0), 0
    with (
        open(folder / "table.tsv", "w", encoding="utf-8") as table,
        tarfile.open(folder / "all.tar", "w") as tar,
        zipfile.ZipFile(folder / "all.zip", "w") as archive,
    ):
        table.write("filepath\ttitle\n")
        for n in tqdm(range(images), "Writing pictures", unit="image"):
            name = f"{n // 1000:05d}/{n:08d}.jpg"
            content = commented(rng.choice(drawn), f"picture {n}")
            (folder / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "folder" / name).write_bytes(content)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            archive.writestr(name, content)
            table.write(f"{name}\ta caption of some words for picture {n}\n")
            total += len(content)
    return total


def measured(commands: Sequence[Sequence[str]], log: Path) -> dict[str, float]:
    """Run commands side by side: seconds, CPU seconds, and peaks in bytes.

    ``parent`` and ``worker`` are the largest resident size that any of the commands, and any process
    started by them, ever had; ``pss`` is the latter with shared pages divided among their users.

    Raises:
        RuntimeError: if one fails, with the end of its output.
    """
    os.sync()
    peaks: dict[str, float] = defaultdict(float)
    began, cpu, look = time.perf_counter(), 0.0, 0
    running = {
        processes.start(command, log.with_suffix(f".{n}")): n for n, command in enumerate(commands)
    }
    while running:
        if time.perf_counter() > began + look * _LOOK_SECONDS:
            _raise_peaks(peaks, [process.pid for process in running], look % 5 == 4)
            look += 1
        for process, n in [*running.items()]:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                cpu += usage.ru_utime + usage.ru_stime  # with those of all that it started
                del running[process]
            if status:
                text = log.with_suffix(f".{n}").read_text(errors="replace")
                raise RuntimeError(f"{' '.join(commands[n])} failed:\n{text[-3000:]}")
        time.sleep(0.01)
    return {"seconds": time.perf_counter() - began, "cpu": cpu, **peaks}


def _raise_peaks(peaks: dict[str, float], sessions: Sequence[int], pss: bool) -> None:
    for session in sessions:
        for pid in processes.members(session):
            kind = "parent" if pid == session else "worker"
            peaks[kind] = max(peaks[kind], processes.memory(pid, "VmHWM"))
            if pss and kind == "worker":
                size = processes.memory(pid, "Pss", "smaps_rollup")
                peaks["pss"] = max(peaks["pss"], size)


class Bench:
    """The made input and the commands that are measured on it."""

    def __init__(self, folder: Path, images: int, img2dataset: str) -> None:
        self.folder, self.images = folder, images
        self.bytes = make(folder, images)
        self.shard_size = min(_LARGEST_SHARD, max(1, images // _SHARDS))
        self.runs: dict[str, Callable[[int], list[list[str]]]] = {
            f"data csv, {source.name}": lambda workers, source=source: [
                self.builder(source, workers)
            ]
            for source in (folder / "folder", folder / "all.tar", folder / "all.zip")
        }
        self.runs["plain loop"] = lambda workers: self.loop("decode", workers)
        self.runs["plain loop, no decoding"] = lambda workers: self.loop("copy", workers)
        if importable(img2dataset, "img2dataset.writer", "img2dataset.resizer"):
            self.runs["img2dataset's writer"] = lambda workers: self.loop(
                "img2dataset", workers, img2dataset
            )
        else:
            print(
                f"{img2dataset} cannot import img2dataset: its row is left out. --img2dataset-python "
                "takes the python of an environment that has it"
            )

    @property
    def output(self) -> Path:
        """Where all of them write."""
        return self.folder / "out"

    def builder(self, source: Path, workers: int) -> list[str]:
        """The command of this package."""
        return [
            *(sys.executable, "-m", "otter_openclip.cli", "data", "csv", "--images", str(source)),
            *("--captions", str(self.folder / "table.tsv"), "--output", str(self.output)),
            *("--shard-size", str(self.shard_size), "--workers", str(workers)),
        ]

    def loop(self, writer: str, workers: int, python: str = sys.executable) -> list[list[str]]:
        """The processes of `data_writers` that share the shards."""
        line = [
            *(python, "-W", "ignore", "-m", "benchmarks.data_writers", writer),
            *("--table", str(self.folder / "table.tsv"), "--images", str(self.folder / "folder")),
            *("--output", str(self.output), "--shard-size", str(self.shard_size)),
            *("--processes", str(workers), "--process"),
        ]
        return [[*line, str(n)] for n in range(workers)]

    def run(self, name: str, workers: int) -> dict[str, float]:
        """Measure one of them, and see that it wrote all pictures."""
        self.output.mkdir()
        found = measured(self.runs[name](workers), self.folder / "log")
        written = sum(path.stat().st_size for path in self.output.rglob("*.tar"))
        if written < self.bytes:
            raise RuntimeError(f"{name} wrote {written} bytes of {self.bytes}")
        shutil.rmtree(self.output)
        return found


def importable(python: str, *modules: str) -> bool:
    """Whether that interpreter can import these."""
    line = [python, "-W", "ignore", "-c", f"import {', '.join(modules)}"]
    return subprocess.run(line, capture_output=True).returncode == 0


def compare(bench: Bench, workers: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """A row for each command and number of workers, the rounds' runs in turn."""
    found = defaultdict(list)
    total = rounds * len(workers) * len(bench.runs)
    with tqdm(total=total, desc="Building", unit="build") as bar:
        for _ in range(rounds):
            for count in workers:
                for name in bench.runs:
                    bar.set_postfix_str(f"{name}, {count}")
                    found[count, name].append(bench.run(name, count))
                    bar.update()

    def median(count: int, name: str, key: str) -> float:
        return statistics.median(run.get(key, 0.0) for run in found[count, name])

    def over(count: int, name: str, other: str, key: str) -> float:
        mine, others = ([run[key] for run in found[count, n]] for n in (name, other))
        return common.ratio(others, mine)

    rows = []
    for count, name in found:
        seconds = median(count, name, "seconds")
        row = {
            "workers": count,
            "what": name,
            "s": seconds,
            "images/s": bench.images / seconds,
            "/s/core": bench.images / seconds / count,
            "CPU ms/image": 1000 * median(count, name, "cpu") / bench.images,
            "of plain": over(count, name, "plain loop", "seconds"),
            "of plain, CPU": over(count, name, "plain loop", "cpu"),
        }
        columns = {"parent": "parent MiB", "worker": "worker MiB", "pss": "its PSS MiB"}
        for key, column in columns.items():
            peak = max(run.get(key, 0.0) for run in found[count, name])
            row[column] = round(peak / 2**20) or None
        rows.append(row)
    return rows


def index_names(folder: Path, count: int) -> Callable[[], None]:
    """The call that indexes ``count`` made names of a tar in ``folder`` and looks some of them up."""
    # The only place that knows how the index is filled; `lookup.Paths` does it from real archives.
    index = lookup.Index(sqlite3.connect(folder / "plan.db"))

    def name(number: int) -> bytes:
        return b"%010d.jpg/%05d/images" % (number * 7919 % count, number % 10_000)

    def call() -> None:
        index.add("made.tar", ((name(n), n * 20_000, 20_000, 0) for n in range(count)))
        index.db.commit()
        for number in range(0, count, max(1, count // _LOOK_UPS)):
            if not index.select(name(number)):
                raise RuntimeError(f"{name(number)} is in the index and is not found")

    return call


def index(count: int) -> dict[str, Any]:
    """Seconds, memory and disk of an index of ``count`` names, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = common.peak_memory(index_names, folder, count)
        disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "names": count,
        "seconds": found["seconds"],
        "added MiB": found["added"] / 2**20,
        "disk MiB": disk / 2**20,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1, help="medians are printed")
    parser.add_argument("--names", type=int, default=10_000_000, help="in the index of file names")
    parser.add_argument(
        "--img2dataset-python",
        default=sys.executable,
        metavar="PYTHON",
        help="of an environment with img2dataset; default: this one",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="to work in; takes 5 times the images; default: that of temporary files",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bench = Bench(Path(folder).resolve(), args.images, args.img2dataset_python)
        rows = compare(bench, args.workers, args.rounds)
        mean = bench.bytes / args.images
    print(common.table(rows))
    names = index(args.names)
    print(common.table([names]))
    if args.output is not None:
        found = {
            "machine": common.machine(),
            "images": args.images,
            "bytes an image": mean,
            "rounds": args.rounds,
            "builds": rows,
            "index": names,
        }
        write_json(args.output, found)


if __name__ == "__main__":
    main()
