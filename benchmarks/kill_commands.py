"""Training, feature cache, export, convert and eval killed at random moments.

Each command runs in forks of one process that has imported everything, is killed up to three times on
the way into one output, and is then left to end. What it wrote must be, tensor by tensor or byte by
byte, what a command wrote that nobody disturbed; and whatever a killed one leaves under a final name
must be whole. After SIGTERM no temporary file may be left.
"""

from __future__ import annotations

import contextlib
import fnmatch
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import command_inputs
from otter_openclip import cli
from otter_openclip.frozen import encoding
from otter_openclip.terminating import EXIT_CODE

# When: at a share of the undisturbed command's time, or as soon as a file that matches is there.
TIME = ""
_IN_A_ROW = 3
_END_SECONDS = 60.0
_TEMPORARY = ("*.tmp", ".*.unfinished", "tmp?*")


@dataclass
class Case:
    """One command.

    Attributes:
        name: of the part.
        make: of a folder, the command line.
        contents: of a folder, what counts of its output, by name; values are compared.
        moments: glob patterns of files at whose first sight to kill, beside random moments.
        resume: words that the command gets when it is run again.
        ranks: processes that work together.
    """

    name: str
    make: Callable[[Path], list[str]]
    contents: Callable[[Path], dict[str, Any]]
    moments: Sequence[str] = ()
    resume: Sequence[str] = ()
    ranks: int = 1
    expected: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    late: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """The case's line of the table."""
        return {
            "command": self.name,
            "work s": self.seconds,
            "kills": self.kills.total(),
            **{name: self.kills[name] for name in ("KILL", "TERM")},
            "at a write": self.kills.total() - self.kills["KILL"] - self.kills["TERM"],
            "too late": self.late,
            "left after s": self.slowest,
            "failures": len(self.failures),
        }


def start(command: Callable[[], int | None], log: Path, environment: dict[str, str]) -> int:
    """Fork a process that runs ``command``; its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
        os.environ.update(environment)
        code = command()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for child in multiprocessing.active_children():
            child.terminate()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code or 0)


class Try:
    """A command's processes, one for each rank, on one output folder."""

    def __init__(self, case: Case, folder: Path, again: bool) -> None:
        """Start them."""
        folder.mkdir(parents=True, exist_ok=True)
        self.case, self.folder = case, folder
        (folder / "temporary").mkdir(exist_ok=True)
        self.log = folder / "log"
        line = [*case.make(folder), *(case.resume if again else ())]
        port = _free_port()
        self.running: dict[int, int] = {}
        self.codes: dict[int, int] = {}
        self.began = time.monotonic()
        self.said_before, self.left = self.said(), _temporary(folder)
        for rank in range(case.ranks):
            environment = {"TMPDIR": str(folder / "temporary")}
            if case.ranks > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(case.ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            self.running[rank] = start(lambda: cli.main(line), self.log, environment)

    def said(self) -> str:
        """What all commands on this folder printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, until: float) -> bool:
        """Until all have ended or the clock's ``until``; whether they have."""
        while self.running:
            for rank, process in [*self.running.items()]:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
                    del self.running[rank]
            if self.running and time.monotonic() > until:
                return False
            time.sleep(0.002)
        return True

    def wait_for(self, pattern: str, share: float, rng: random.Random) -> bool:
        """Until the moment to kill has come; whether the command still runs then."""
        if self.case.ranks > 1:  # before they have met, only torchrun knows of both
            while "Start epoch" not in self.said()[len(self.said_before) :]:
                if self.wait(0):
                    return False
        if not pattern:
            begun = self.began if self.case.ranks == 1 else time.monotonic()
            rest = self.case.seconds * (1 if self.case.ranks == 1 else 0.5)
            return not self.wait(begun + share * rest)
        before = _matching(self.folder, pattern)
        wanted = rng.randint(1, 2)  # the first or the second such file
        while not self.wait(0):
            before |= (found := _matching(self.folder, pattern) - before)
            wanted -= len(found)
            if wanted <= 0:
                return True
        return False

    def end(self) -> None:
        """Make an end of what is left."""
        for process in self.running.values():
            os.kill(process, signal.SIGKILL)
        self.wait(time.monotonic() + 5)


def try_case(case: Case, folder: Path, kills: int, rng: random.Random, bar: tqdm) -> None:
    """Fill ``case`` with ``kills`` kills, SIGKILL and SIGTERM by turns."""
    whole = Try(case, folder / "whole", again=False)
    if not whole.wait(time.monotonic() + _END_SECONDS) or any(whole.codes.values()):
        whole.end()
        case.failures.append(f"{case.name}, undisturbed: {whole.codes}, {whole.said()[-600:]}")
        return
    case.seconds = time.monotonic() - whole.began
    case.expected = case.contents(whole.folder)
    plan = [
        (manner, case.moments[n // 4 % len(case.moments)] if case.moments and n % 4 > 1 else TIME)
        for n in range(kills)
        for manner in [("KILL", "TERM")[n % 2]]
    ]
    shares = [(n + rng.random()) / kills for n in range(kills)]
    rng.shuffle(plan)
    rng.shuffle(shares)
    for attempt in range(3 * kills):
        if not plan:
            return
        out = folder / f"out-{attempt}"
        _disturbed(case, out, plan, shares, rng, bar)
        if not case.failures:
            shutil.rmtree(out)
    case.failures.append(f"{case.name}: {len(plan)} of {kills} kills met no command")


def _disturbed(
    case: Case,
    out: Path,
    plan: list[tuple[str, str]],
    shares: list[float],
    rng: random.Random,
    bar: tqdm,
) -> None:
    story = case.name
    again = False
    for _ in range(rng.randint(1, _IN_A_ROW)):
        if not plan:
            break
        manner, pattern = plan[-1]
        run, again = Try(case, out, again), True
        if not run.wait_for(pattern, shares[-1], rng):
            case.late += 1
            if not pattern and case.ranks == 1:  # the undisturbed one had less of the machine
                case.seconds = min(case.seconds, time.monotonic() - run.began)
            break
        plan.pop()
        story += f", {manner} at {pattern or format(shares.pop(), '.0%')}"
        case.kills[manner] += not pattern
        case.kills[pattern] += bool(pattern)
        victim = rng.choice([*run.running])
        sent = time.monotonic()
        os.kill(run.running[victim], getattr(signal, f"SIG{manner}"))
        ended = run.wait(sent + _END_SECONDS)
        case.slowest = max(case.slowest, time.monotonic() - sent)
        bar.update()
        _check_killed(case, run, manner, victim, ended, story)
    run = Try(case, out, again)
    if not run.wait(time.monotonic() + _END_SECONDS) or any(run.codes.values()):
        run.end()
        case.failures.append(f"{story}, then again: {run.codes}, {run.said()[-600:]}")
        return
    found = case.contents(out)
    wrong = [name for name in case.expected if not same(case.expected[name], found.get(name))]
    if wrong or found.keys() != case.expected.keys():
        names = wrong or sorted(found.keys() ^ case.expected.keys())
        case.failures.append(f"{story}, then again: other contents: {', '.join(names)}")


def _check_killed(case: Case, run: Try, manner: str, victim: int, ended: bool, story: str) -> None:
    codes = dict(run.codes)
    if not ended:
        case.failures.append(f"{story}: ranks {[*run.running]} do not end")
        run.end()
        return
    said = run.said()[len(run.said_before) :]
    if manner == "TERM" and codes[victim] not in (0, EXIT_CODE):
        # Before the handler is there, SIGTERM ends the process itself: nothing has been begun then.
        if codes[victim] != -signal.SIGTERM or said:
            case.failures.append(f"{story}: code {codes[victim]}, {said[-600:]}")
    if manner == "TERM" and case.ranks == 1:
        left = [str(path.relative_to(run.folder)) for path in _temporary(run.folder) - run.left]
        if left:
            case.failures.append(f"{story}: temporary files {', '.join(left)}")
    if case.ranks > 1 and codes[victim]:
        for rank, code in codes.items():
            named = f"rank {victim} of {case.ranks} has ended" in said
            if rank != victim and (code == 0 or not named):
                case.failures.append(f"{story}: rank {rank} ended with {code}, {said[-900:]}")
    for name, value in case.contents(run.folder).items():
        if not same(value, case.expected.get(name)):
            case.failures.append(f"{story}: {name} is not that of the undisturbed command")


def same(one: Any, other: Any) -> bool:
    """Bit-identical nested containers of tensors and plain values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def _temporary(folder: Path) -> set[Path]:
    found = {path for pattern in _TEMPORARY for path in _matching(folder, pattern)}
    return found - {folder / "temporary"}


def _matching(folder: Path, pattern: str) -> set[Path]:
    """As ``rglob``, which fails when a folder goes meanwhile."""
    return {
        Path(at, name)
        for at, folders, files in os.walk(folder)
        for name in fnmatch.filter([*folders, *files], pattern)
    }


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cases(inputs: command_inputs.Inputs) -> dict[str, Case]:
    """All parts but the builders, by name."""
    checkpoints = ("epoch_*.pt.tmp", "epoch_*.pt")
    return {
        "training": Case(
            "training",
            lambda out: inputs.train(out, "--save-frequency", "1", "--workers", "0"),
            command_inputs.checkpoints,
            moments=checkpoints,
            resume=["--resume", "latest"],
        ),
        "latest": Case(
            "latest",
            lambda out: inputs.train(
                out, "--save-most-recent", "--delete-previous-checkpoint", "--workers", "1"
            ),
            command_inputs.last_checkpoint,
            moments=("tmp.pt.tmp", "epoch_latest.pt"),
            resume=["--resume", "latest"],
        ),
        "ranks": Case(
            "ranks",
            lambda out: inputs.train(out, "--workers", "0", "--local-loss", "--gather-with-grad"),
            command_inputs.checkpoints,
            resume=["--resume", "latest"],
            ranks=2,
        ),
        "cache": Case(
            "cache",
            inputs.train_cached,
            command_inputs.last_and_features,
            moments=("*.safetensors.tmp", "*.safetensors"),
            resume=["--resume", "latest"],
        ),
        "export": Case(
            "export",
            inputs.export,
            command_inputs.exported,
            moments=(".exported-*", "open_clip_model.safetensors"),
        ),
        "convert": Case(
            "convert",
            inputs.convert,
            command_inputs.exported,
            moments=(".exported-*", "open_clip_model.safetensors"),
        ),
        "eval": Case("eval", inputs.evaluate, command_inputs.results, moments=("*.tmp",)),
    }


def try_parts(names: Sequence[str], folder: Path, kills: int, rng: random.Random) -> list[Case]:
    """Kill each of the named parts ``kills`` times."""
    torch.set_num_threads(1)
    encoding.ROUND, encoding._BATCH = 0.05, {"cpu": 16}  # several files in a cache
    inputs = command_inputs.Inputs(folder / "inputs")
    folder.mkdir(parents=True)
    trained = not {"export", "convert", "eval"}.isdisjoint(names)
    # In a process of its own: one that has trained cannot be forked.
    made = start(lambda: inputs.make(trained=trained), folder / "log", {})
    if os.waitpid(made, 0)[1]:
        raise RuntimeError((folder / "log").read_text())
    inputs = command_inputs.Inputs(folder / "inputs")
    found = [case for name, case in cases(inputs).items() if name in names]
    with tqdm(total=kills * len(found), desc="Kills", unit="kill") as bar:
        for case in found:
            bar.set_postfix_str(case.name)
            try_case(case, folder / case.name, kills, rng, bar)
    return found
