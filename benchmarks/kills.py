"""Commands killed at random moments: nothing may be lost, doubled or changed, nobody left behind.

``--parts`` says which; ``kill_commands`` has all but the builders. Every builder makes shards of a few
hundred pictures, some of them missing or broken. The command is killed several times in a row on the way
into one output, in six manners, and then left to end: each file of the output must be byte for byte that
of a build which nobody disturbed. Moments are counted from the first file that the command opens, so
that none is spent on the imports.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import common, kill_inputs, processes
from otter_openclip.files import write_json

# SIGKILL to the parent alone, to all processes, to one worker; what a job scheduler and Ctrl-C send; and
# Ctrl-C in the milliseconds in which the workers start.
MANNERS = ("parent", "group", "worker", "TERM", "INT", "INT start")
WORKERS = (1, 3)
PARTS = ("training", "latest", "ranks", "cache", "export", "convert", "eval", "builders")
_IN_A_ROW = 3
_GONE_SECONDS = 5.0
_END_SECONDS = 30.0


@dataclass(frozen=True)
class Kill:
    """A kill: its manner, and the moment as a share of the undisturbed build's work."""

    case: str
    manner: str
    workers: int
    moment: float


@dataclass
class Trial:
    """One builder's command on one input.

    Attributes:
        case: name.
        command: without --output and --workers.
        folder: with its inputs; outputs go beside them.
        expected: the files of the undisturbed build.
        seconds: workers -> how long that build worked.
        kills: those that met a running command.
        late: number of commands that had ended before their moment.
        left: most seconds until no process was left of a killed command.
        killed: process and moment of the last kill, until all of its processes are seen to be gone.
        failures: what went wrong.
    """

    case: str
    command: list[str]
    folder: Path
    expected: dict[str, bytes] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    kills: list[Kill] = field(default_factory=list)
    late: int = 0
    left: float = 0.0
    killed: tuple[int, float] | None = None
    failures: list[str] = field(default_factory=list)

    def undisturbed(self) -> bool:
        """Build with each number of workers; whether that worked, all of them alike."""
        for workers in WORKERS:
            out = self.folder / f"whole-{workers}"
            process = self._start(out, workers)
            began = self._working(process)
            self._end(process, out, f", undisturbed by {workers} workers")
            self.seconds[workers] = time.monotonic() - began
        return not self.failures

    def disturbed(self, out: Path, first: float, manners: list[str], rng: random.Random) -> None:
        """Kill a few commands into ``out``, then let one end and compare.

        Args:
            out: output folder.
            first: the first kill's moment, as a share of the work.
            manners: of the kills, taken from the end.
            rng: the rest of chance.
        """
        done, moment, story = 0.0, first, ""
        for _ in range(min(rng.randint(1, _IN_A_ROW), len(manners))):
            manner = manners[-1]
            moment = 0.0 if manner == "INT start" else moment
            with_workers = manner in ("parent", "worker", "INT start")
            workers = WORKERS[-1] if with_workers else rng.choice(WORKERS)
            process = self._start(out, workers)
            self._gone(story)
            began = self._working(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, began + moment * self.seconds[workers] - time.monotonic()))
            if not self._kill(process, manner, rng):
                self.late += 1
                if not story:  # the undisturbed build had less of the machine
                    self.seconds[workers] = time.monotonic() - began
                break
            manners.pop()
            self.kills.append(Kill(self.case, manner, workers, moment))
            story += f", {manner} at {moment:.0%} of {workers} workers"
            self._wait(process, story)
            self._check_stopped(process.returncode, out, story)
            if rng.random() < 0.5:  # otherwise the next command starts beside what may be left
                self._gone(story)
            done = min(0.9, done + moment)
            moment = rng.random() ** 2 * (1 - done)  # where a resume starts its workers: early
        process = self._start(out, rng.choice(WORKERS))
        self._gone(story)
        self._end(process, out, story)

    def _start(self, out: Path, workers: int) -> subprocess.Popen:
        line = [*self.command, "--output", out, "--workers", str(workers)]
        return processes.start(line, self.folder / "log")

    def _working(self, process: subprocess.Popen) -> float:
        """Wait until the command has opened one of its files; when that was."""
        descriptors = Path(f"/proc/{process.pid}/fd")
        while process.poll() is None:
            for name in _names(descriptors):
                path = _target(descriptors / name)
                if path.startswith(f"{self.folder}/") and name not in ("1", "2"):
                    return time.monotonic()
            time.sleep(0.002)
        return time.monotonic()

    def _kill(self, process: subprocess.Popen, manner: str, rng: random.Random) -> bool:
        """Kill in this manner, once there are workers if it needs them; whether it met a command."""
        others: list[int] = []
        while manner in ("worker", "INT start") and not others and process.poll() is None:
            others = [pid for pid in processes.members(process.pid) if pid != process.pid]
        if others:
            time.sleep(0.012 * rng.random())
        if process.poll() is not None:
            return False
        self.killed = process.pid, time.monotonic()
        if manner == "worker":
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(rng.choice(others), signal.SIGKILL)
        elif manner == "group":
            os.killpg(process.pid, signal.SIGKILL)
        elif manner in ("INT", "INT start"):
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGTERM if manner == "TERM" else signal.SIGKILL)
        return True

    def _wait(self, process: subprocess.Popen, story: str) -> None:
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            left = len(processes.members(process.pid))
            self._fail(story, f"does not end, {left} processes, {self._said()}")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _gone(self, story: str) -> None:
        """See that soon no process is left of the command killed last."""
        if self.killed is None:
            return
        session, since = self.killed
        began = time.monotonic()
        while left := processes.members(session):
            if time.monotonic() - began > _GONE_SECONDS:
                self._fail(story, f"{len(left)} processes are left")
                os.killpg(session, signal.SIGKILL)
                break
            self.left = max(self.left, time.monotonic() - since)
            time.sleep(0.01)
        self.killed = None

    def _end(self, process: subprocess.Popen, out: Path, story: str) -> None:
        """Let a command end; it must succeed and its files be those of the undisturbed build."""
        self._wait(process, story)
        found = files_of(out)
        self.expected = self.expected or found
        names = sorted(self.expected.keys() | found.keys())
        wrong = [name for name in names if self.expected.get(name) != found.get(name)]
        if process.returncode:
            self._fail(story, f"code {process.returncode}, {self._said()}")
        elif wrong:
            self._fail(story, f"other contents: {', '.join(wrong)}")

    def _check_stopped(self, code: int, out: Path, story: str) -> None:
        """What a stopped command leaves under its final name must be final."""
        found = files_of(out)
        if "report.json" in found and found != self.expected:
            self._fail(story, "report.json is there, and not all of the rest")
        if code == 0 and "report.json" not in found:
            self._fail(story, "code 0 without report.json")
        for name in found:
            if name.endswith(".tar") and found[name] != self.expected.get(name):
                self._fail(story, f"{name} is unfinished")

    def _said(self) -> str:
        """The end of what the last command printed."""
        return " ".join((self.folder / "log").read_text(errors="replace").split())[-400:]

    def _fail(self, story: str, what: str) -> None:
        self.failures.append(f"{self.case}{story}: {what}")

    def row(self) -> dict[str, Any]:
        """The trial's line of the table."""
        counts = Counter(kill.manner for kill in self.kills)
        moments = sorted(round(100 * k.moment) for k in self.kills if k.manner != "INT start")
        return {
            "builder": self.case,
            "work s": self.seconds.get(WORKERS[0]),
            "kills": len(self.kills),
            **{manner: counts[manner] for manner in MANNERS},
            "moments %": f"{moments[0]}-{moments[-1]}" if moments else None,
            "too late": self.late,
            "left s": self.left,
            "failures": len(self.failures),
        }


def files_of(out: Path) -> dict[str, bytes]:
    """The contents of an output, by name, without the hidden state."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and ".otter-build" not in path.relative_to(out).parts
    }


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def try_case(trial: Trial, kills: int, rng: random.Random, bar: tqdm) -> None:
    """Fill ``trial`` with ``kills`` kills, their manners in equal numbers."""
    if not trial.undisturbed():
        return
    manners = [MANNERS[n % len(MANNERS)] for n in range(kills)]
    rng.shuffle(manners)
    for attempt in range(3 * kills):
        if not manners:
            return
        before = len(trial.kills)
        # The golden ratio's multiples spread the first kills evenly, however many there will be.
        first = (attempt * 0.618 + rng.random() / kills) % 1
        trial.disturbed(trial.folder / f"out-{attempt}", first, manners, rng)
        bar.update(len(trial.kills) - before)
    trial.failures.append(f"{trial.case}: only {len(trial.kills)} of {kills} kills met a build")


def try_builders(args: argparse.Namespace, folder: Path, rng: random.Random) -> list[Trial]:
    """Kill all builders, or those asked for."""
    inputs = kill_inputs.make(folder, args.images, args.builders or [*kill_inputs.CASES])
    data = [sys.executable, "-m", "otter_openclip.cli", "data"]
    trials = [Trial(case, [*data, *words], folder / case) for case, words in inputs.items()]
    kills = -(-args.kills // len(trials))
    with tqdm(total=kills * len(trials), desc="Kills", unit="kill") as bar:
        for trial in trials:
            bar.set_postfix_str(trial.case)
            try_case(trial, kills, rng, bar)
    return trials


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="default: all")
    parser.add_argument("--kills", type=int, default=120, help="of all builders together, at least")
    parser.add_argument("--kills-each", type=int, default=24, help="of each part but the builders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--builders", choices=kill_inputs.CASES, nargs="+", help="default: all")
    parser.add_argument("--images", type=int, default=240, help="of each builder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    tables: dict[str, list[dict[str, Any]]] = {}
    kills: list[Kill] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        others = [part for part in args.parts if part != "builders"]
        if others:
            from benchmarks import kill_commands  # with torch

            cases = kill_commands.try_parts(others, folder / "commands", args.kills_each, rng)
            tables["commands"] = [case.row() for case in cases]
            failures += [failure for case in cases for failure in case.failures]
        if "builders" in args.parts:
            trials = try_builders(args, folder, rng)
            tables["builders"] = [trial.row() for trial in trials]
            kills = [kill for trial in trials for kill in trial.kills]
            failures += [failure for trial in trials for failure in trial.failures]
    for rows in tables.values():
        print(common.table(rows))
    count = sum(row["kills"] for rows in tables.values() for row in rows)
    print(f"{count} kills, {len(failures)} failures", *failures, sep="\n")
    if args.output is not None:
        found = {"seed": args.seed, **tables, "failures": failures}
        if kills:
            found["kills"] = [asdict(kill) for kill in kills]
        write_json(args.output, found)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
