"""`otter-openclip data csv`: samples per second, from a folder, a tar and a zip.

Beside it, in the same run and in turn: plain loops over the same files that write with webdataset. With
N workers they are N processes that share the shards. All are timed with their start (give it many
images). What is yet to be written to disk is waited for before each.
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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks import common
from otter_openclip.data import lookup
from otter_openclip.data.sources import File
from otter_openclip.files import write_json

_PICTURES = 300
_SHARDS = 10
_LARGEST_SHARD = 10_000
_LOOK_UPS = 100_000


def pictures(count: int) -> list[bytes]:
    """JPEGs of 10 to 30 kB, of photographs' sizes and about their detail."""
    drawn = []
    for seed in tqdm(range(count), "Drawing pictures", leave=False):
        rng = np.random.default_rng(seed)
        size = (int(rng.integers(320, 449)), int(rng.integers(256, 385)))
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        grain = rng.normal(0, 3, (*smooth.shape[:2], 1)).round().astype(np.int16)
        buffer = io.BytesIO()
        picture = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
        picture.save(buffer, "JPEG", quality=int(rng.integers(50, 81)))
        drawn.append(buffer.getvalue())
    return drawn


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
        zipfile.ZipFile(folder / "all.zip", "w") as archive,
    ):
        table.write("filepath\ttitle\n")
        for n in tqdm(range(images), "Writing pictures", unit="image"):
            name = f"{n // 1000:05d}/{n:08d}.jpg"
            content = commented(rng.choice(drawn), f"picture {n}")
            (folder / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "folder" / name).write_bytes(content)
            archive.writestr(name, content)
            table.write(f"{name}\ta caption of some words for picture {n}\n")
            total += len(content)
    with tarfile.open(folder / "all.tar", "w") as tar:
        tar.add(folder / "folder", ".")
    return total


def measured(commands: Sequence[Sequence[str]], log: Path) -> dict[str, float]:
    """Run commands side by side: seconds and CPU seconds.

    Raises:
        RuntimeError: if one fails, with the end of its output.
    """
    os.sync()
    began, cpu = time.perf_counter(), 0.0
    with open(log, "w+b") as file:
        started = [subprocess.Popen(command, stdout=file, stderr=file) for command in commands]
        for process in started:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            cpu += usage.ru_utime + usage.ru_stime  # with those of all that it started
        if any(process.returncode for process in started):
            said = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise RuntimeError(f"{commands[0]} failed:\n{said}")
    return {"seconds": time.perf_counter() - began, "cpu": cpu}


class Bench:
    """The made input and the commands that are measured on it."""

    def __init__(self, folder: Path, images: int) -> None:
        self.folder, self.images, self.output = folder, images, folder / "out"
        self.bytes = make(folder, images)
        self.shard_size = min(_LARGEST_SHARD, max(1, images // _SHARDS))
        self.runs: dict[str, Callable[[int], list[list[str]]]] = {
            f"data csv, {source}": partial(self.builder, folder / source)
            for source in ("folder", "all.tar", "all.zip")
        }
        self.runs["plain loop"] = partial(self.loop, "decode")
        self.runs["plain loop, no decoding"] = partial(self.loop, "copy")

    def builder(self, source: Path, workers: int) -> list[list[str]]:
        """The command of this package."""
        line = [sys.executable, "-m", "otter_openclip.cli", "data", "csv", "--images", str(source)]
        line += ["--captions", str(self.folder / "table.tsv"), "--output", str(self.output)]
        return [[*line, "--shard-size", str(self.shard_size), "--workers", str(workers)]]

    def loop(self, writer: str, workers: int) -> list[list[str]]:
        """The processes of `data_writers` that share the shards."""
        line = [sys.executable, "-W", "ignore", "-m", "benchmarks.data_writers", writer]
        line += ["--table", str(self.folder / "table.tsv"), "--images", str(self.folder / "folder")]
        line += ["--output", str(self.output), "--shard-size", str(self.shard_size)]
        return [[*line, "--processes", str(workers), "--process", str(n)] for n in range(workers)]

    def run(self, name: str, workers: int) -> dict[str, float]:
        """Measure one of them, and see that it wrote all pictures."""
        self.output.mkdir()
        run = measured(self.runs[name](workers), self.folder / "log")
        written = sum(path.stat().st_size for path in self.output.rglob("*.tar"))
        if written < self.bytes:
            raise RuntimeError(f"{name} wrote {written} bytes of {self.bytes}")
        shutil.rmtree(self.output)
        return run


def compare(bench: Bench, workers: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """A row for each command and number of workers, the rounds' runs in turn."""
    runs = defaultdict(list)
    every = [(count, name) for _ in range(rounds) for count in workers for name in bench.runs]
    for count, name in tqdm(every, "Building", unit="build"):
        runs[count, name].append(bench.run(name, count))
    rows = []
    for (count, name), timed in runs.items():
        plain = runs[count, "plain loop"]
        seconds, cpu = (statistics.median(run[key] for run in timed) for key in ("seconds", "cpu"))
        of_plain = {
            key: common.ratio([run[key] for run in plain], [run[key] for run in timed])
            for key in ("seconds", "cpu")
        }
        rows.append(
            {
                "workers": count,
                "what": name,
                "images/s": bench.images / seconds,
                "CPU ms/image": 1000 * cpu / bench.images,
                "of plain": of_plain["seconds"],
                "of plain, CPU": of_plain["cpu"],
            }
        )
    return rows


def index_names(folder: Path, count: int) -> Callable[[], None]:
    """The call that indexes ``count`` made names of a tar in ``folder`` and looks some of them up."""
    index = lookup.Index(sqlite3.connect(folder / "plan.db"))

    def entry(number: int) -> tuple[str, str, File]:
        name = f"{number * 7919 % count:010d}.jpg"
        return (
            name,
            f"images/{number % 10_000:05d}/{name}",
            File("made.tar", number * 20_000, 20_000),
        )

    def call() -> None:
        index.add("made.tar", map(entry, range(count)))
        index.db.commit()
        for number in range(0, count, max(1, count // _LOOK_UPS)):
            if len(index.select(*entry(number)[:2])) != 1:
                raise RuntimeError(f"{entry(number)} is in the index and is not found")

    return call


def index(count: int) -> dict[str, Any]:
    """Seconds, memory and disk of an index of ``count`` names, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        use = common.peak_memory(index_names, Path(name), count)
        disk = sum(path.stat().st_size for path in Path(name).rglob("*"))
    use = {"seconds": use["seconds"], "added MiB": use["added"] / 2**20}
    return {"names": count, **use, "disk MiB": disk / 2**20}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--images", type=int, default=100_000)
    add("--workers", type=int, nargs="+", default=[1, 2])
    add("--rounds", type=int, default=1, help="medians are printed")
    add("--names", type=int, default=10_000_000, help="in the index of file names")
    add(
        "--folder", type=Path, help="to work in; takes 5 times the images; default: a temporary one"
    )
    add("--output", type=Path, metavar="FILE", help="write the results as JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bench = Bench(Path(folder).resolve(), args.images)
        rows = compare(bench, args.workers, args.rounds)
    print(common.table(rows))
    names = index(args.names)
    print(common.table([names]))
    if args.output is not None:
        results = {"machine": common.machine(), "images": args.images, "rounds": args.rounds}
        results |= {"bytes an image": bench.bytes / args.images, "builds": rows, "index": names}
        write_json(args.output, results)


if __name__ == "__main__":
    main()
