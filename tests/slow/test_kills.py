"""Commands that are killed or find no room: the same command goes on, and nothing is lost or changed.

Each is killed up to three times in a row on the way into one output, at a random moment or at the
sight of a random one of the names that it makes, by SIGKILL or SIGTERM; and is then left to end. What
it wrote must be what a command wrote that nobody disturbed; so must what a killed one leaves under a
final name.
OTTER_KILLS is the number of kills for each command, OTTER_SEED another course of them.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import resource
import runpy
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from data_helpers import jpeg, tree, write_files, write_tar
from training_helpers import assert_same, load

from otter_openclip.model_folders.towers import make_towers

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("OTTER_KILLS", 3))
SEED = int(os.environ.get("OTTER_SEED", 0))
IN_A_ROW = 3
SHARES = (0.3, 0.95)  # of the largest file, for a disk's room: the system's limit on a file's size
OUT = "OUT"  # in a command line, the folder that it writes into
END_SECONDS = 120.0
GONE_SECONDS = 15.0  # loader processes look for their parent every 5 s
PICTURES = 120
# Commands run in forks of a process that has imported what takes seconds to import.
FORKS = multiprocessing.get_context("forkserver")
IMPORTED = ["open_clip_train.main", "clip_benchmark.cli", "transformers", "pytest"]
FORKS.set_forkserver_preload(IMPORTED)


class Command(NamedTuple):
    """A module and its arguments, and what counts of the folder that it writes into.

    ``contents`` are there under their final name, and must be those of the undisturbed command as soon
    as they are there; ``last`` is what else counts once the command has ended.
    """

    words: Sequence[str | Path]
    contents: Callable[[Path], dict[str, Any]]
    last: Callable[[Path], dict[str, Any]] = lambda out: {}
    again: Sequence[str] = ()  # words that it gets when it is run again


def execute(words: list[str], out: Connection, largest_file: int) -> None:
    """What the process does: ``python -m WORDS`` in a session of its own."""
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(out.fileno(), descriptor)
    kept = {"buffering": 1, "closefd": False, "encoding": "utf-8"}
    sys.stdout, sys.stderr = (open(n, "w", **kept) for n in (1, 2))
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that is no such fork
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


class Running:
    def __init__(self, command: Command, out: Path, *, again: bool, largest_file: int = 0) -> None:
        """Start it; ``largest_file`` is a disk's room for each file, in bytes."""
        out.mkdir(exist_ok=True)
        self.out, self.before, self.said = out, names(out), ""
        words = [str(w).replace(OUT, str(out)) for w in (*command.words, *command.again * again)]
        self._output, output = FORKS.Pipe(duplex=False)
        self.process = FORKS.Process(target=execute, args=(words, output, largest_file))
        self.process.start()
        output.close()

    def runs(self) -> bool:
        """Whether it has not ended; what it printed is taken, or it would wait for that."""
        descriptor, running = self._output.fileno(), self.process.is_alive()
        while select.select([descriptor], [], [], 0)[0] and (text := os.read(descriptor, 65536)):
            self.said += text.decode(errors="replace")
        return running

    def wait(self) -> int:
        """Its exit code; a failure of the test if it does not end."""
        until = time.monotonic() + END_SECONDS
        while self.runs():
            if time.monotonic() > until:
                os.killpg(self.process.pid, signal.SIGKILL)
                pytest.fail(f"the command does not end: {self.said}")
            time.sleep(0.01)
        return self.process.exitcode

    def waits(self, *, count: int | None = None, seconds: float = 0) -> bool:
        """Wait so long, or until so many new names are below the output; whether it still runs then."""
        until = time.monotonic() + seconds
        while self.runs():
            new = len(names(self.out) - self.before)
            if time.monotonic() > until if count is None else new >= count:
                return True
            time.sleep(0.001)
        return False

    def left(self) -> list[int]:
        """Processes of the session that have not ended within some seconds."""
        until = time.monotonic() + GONE_SECONDS
        while True:
            left = [pid for pid, _, session in processes() if session == self.process.pid]
            if not left or time.monotonic() > until:
                return left
            time.sleep(0.05)


def processes() -> Iterator[tuple[int, int, int]]:
    """Number, parent and session of each process that has not ended."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            said = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8")
            fields = said.rpartition(")")[2].split()
            if fields[0] not in "ZX":
                yield int(entry), int(fields[1]), int(fields[3])


def names(folder: Path) -> set[str]:
    """All that is below a folder, which may change meanwhile."""
    return {os.path.join(at, n) for at, folders, files in os.walk(folder) for n in folders + files}


def temporary(folder: Path) -> set[str]:
    """What a command may not leave after SIGTERM or an error."""
    return {name for name in names(folder) if name.endswith((".tmp", ".unfinished"))}


def checkpoints(out: Path, pattern: str = "epoch_*.pt") -> dict[str, Any]:
    return {path.name: load(path) for path in out.glob(f"logs/run/checkpoints/{pattern}")}


def exported(out: Path) -> dict[str, Any]:
    """An exported folder's files; one names its own folder."""
    files = [path for path in (out / "exported").rglob("*") if path.is_file()]
    return {path.name: path.read_bytes().replace(bytes(out), b"OUT") for path in files}


def results(out: Path) -> dict[str, Any]:
    found = out.glob("results.json")
    return {f.name: json.loads(f.read_text(encoding="utf-8"))["metrics"] for f in found}


def built(out: Path) -> dict[str, Any]:
    """A builder's files but its hidden state and what was not renamed yet."""
    return {name: digest for name, digest in tree(out).items() if not name.endswith(".tmp")}


def make_data(folder: Path) -> list[str | Path]:
    """A builder's words: of an archive that has to be unpacked, some pictures missing or cut short."""
    pictures = {f"{n}.jpg": jpeg(n, (640, 480)) for n in range(PICTURES) if n % 13 != 5}
    pictures |= {name: content[:-900] for name, content in [*pictures.items()][7::17]}
    rows = ["filepath\ttitle", *(f"{n}.jpg\ta picture of {n}" for n in range(PICTURES))]
    write_files(folder, {"table.tsv": "\n".join(rows).encode()})
    words = ["csv", "--captions", folder / "table.tsv", "--resize", "200", "--shard-size", "10"]
    archive = write_tar(folder / "pictures.tar.gz", pictures, "w:gz")
    return [*words, "--workers", "2", "--images", archive]


NAMES = ("training", "most recent", "cached", "ranks", "export", "eval", "data")


@pytest.fixture(scope="session")
def commands(tmp_path_factory, pairs, labelled, towers) -> dict[str, Command]:
    folder = tmp_path_factory.mktemp("inputs")
    model = make_towers(folder / "model", image_size=32, context_length=8, **towers)
    program = ("otter_openclip.cli",)
    train = f"train --loss otter --model local-dir:{model} --logs OUT/logs --name run --epochs 4"
    train += f" --train-data {pairs}/{{00000..00001}}.tar --batch-size 12 --warmup 1 --lr 1e-2"
    train = train.split()
    latest = ("--resume", "latest")
    most_recent = ("--save-most-recent", "--delete-previous-checkpoint", "--workers", "1")
    judged = [*train, "--workers", "0", "--zeroshot-data", labelled]
    best = partial(checkpoints, pattern="best.pt")
    cached = [*train, "--lock-image", "--lock-text", "--lock-text-freeze-layer-norm"]
    cached += ["--workers", "0", "--feature-cache", "OUT/features"]
    torchrun = "torch.distributed.run --standalone --nproc_per_node 2 -m -- otter_openclip.train"
    ranks = ("--workers", "0", "--local-loss", "--gather-with-grad")
    last = partial(checkpoints, pattern="epoch_latest.pt")

    first = Running(Command([*program, *train, "--workers", "0"], checkpoints), folder, again=False)
    assert first.wait() == 0, first.said
    trained = folder / "logs" / "run" / "checkpoints" / "epoch_4.pt"
    export = f"export {trained} OUT/exported --overwrite --model local-dir:{model}".split()
    evaluate = f"eval --model local-dir:{model} --pretrained= --dataset wds/made --no_amp"
    evaluate += f" --dataset_root {labelled} --num_workers 0 --batch_size 8"
    evaluate += " --task zeroshot_classification --output OUT/results.json"
    return {
        "training": Command([*program, *judged], checkpoints, best, latest),
        "most recent": Command([*program, *train, *most_recent], lambda out: {}, last, latest),
        "cached": Command([*program, *cached], checkpoints, again=latest),
        "ranks": Command([*torchrun.split(), *train[1:], *ranks], checkpoints, again=latest),
        "export": Command([*program, *export], exported),
        "eval": Command([*program, *evaluate.split()], results),
        "data": Command([*program, "data", *make_data(folder / "data"), "--output", "OUT"], built),
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_same_command_goes_on(name, commands, tmp_path):
    command, rng = commands[name], random.Random(f"{name} {SEED}")
    whole = Running(command, tmp_path / "whole", again=False)
    began, seen = time.monotonic(), set()
    while whole.runs():
        seen |= names(whole.out)
        time.sleep(0.001)
    assert whole.wait() == 0, whole.said
    seconds = time.monotonic() - began
    wanted = KILLS if name != "ranks" else -(-KILLS // 3)  # two processes that import everything
    kills = late = 0
    while kills < wanted:
        assert late < 9 * wanted, f"only {kills} of {wanted} kills met a command"
        out, again = tmp_path / f"out-{kills}-{late}", False
        for _ in range(rng.randint(1, IN_A_ROW)):
            run, again = Running(command, out, again=again), True
            by_name = {"count": rng.randint(1, len(seen))}
            moment = rng.choice([by_name, {"seconds": rng.random() * seconds}])
            if not run.waits(**moment):
                late += 1
                break
            kills += kill(command, run, rng.choice([signal.SIGKILL, signal.SIGTERM]), rng)
            for part, value in command.contents(out).items():
                assert_same(value, command.contents(whole.out)[part], part)
        run = Running(command, out, again=again)
        assert run.wait() == 0, run.said
        for contents in (command.contents, command.last):
            assert_same(contents(whole.out), contents(out))


def kill(command: Command, run: Running, number: int, rng: random.Random) -> bool:
    """Kill a command, or one of its ranks; whether it was still there.

    After SIGTERM there are no more temporary files than before.
    """
    launcher = run.process.pid if "torch.distributed.run" in command.words else None
    ranks = [pid for pid, parent, _ in processes() if parent == launcher]
    try:
        os.kill(rng.choice(ranks) if ranks else run.process.pid, number)
    except ProcessLookupError:
        return False
    code = run.wait()
    if number == signal.SIGTERM and not ranks:
        # Before the handler is there, the signal ends the process itself.
        assert code in (0, 128 + signal.SIGTERM) or run.before == names(run.out), run.said
        assert temporary(run.out) <= run.before, run.said
    assert not run.left()
    return True


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ranks"])
def test_a_full_disk(name, commands, tmp_path):
    command = commands[name]
    whole = Running(command, tmp_path / "whole", again=False)
    assert whole.wait() == 0, whole.said
    expected = command.contents(whole.out) | command.last(whole.out)
    files = [path for path in whole.out.rglob("*") if path.is_file()]
    largest = max(path.stat().st_size for path in files)
    for share in SHARES:
        out = tmp_path / f"out-{share}"
        run = Running(command, out, again=False, largest_file=int(share * largest))
        assert run.wait() > 0, "a negative code is a signal's"
        assert "too large" in run.said or "full" in run.said
        assert not temporary(out)
        for part, value in command.contents(out).items():
            assert_same(value, expected[part], part)
        again = Running(command, out, again=True)
        assert again.wait() == 0, again.said
        assert_same(expected, command.contents(out) | command.last(out))
