"""Thousands of steps of a tiny model: nothing grows, the teacher does not drift, all is logged.

Once live and once on cached features. Memory, open files, threads, child processes and live tensors of
the training process are read at intervals. After each step the student goes into the closed form of the
EMA teacher, the sum of all students under the weights of the decays min(d, (1 + n) / (10 + n)), in
float64; in the end the teacher in the checkpoint is compared with it.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from benchmarks import common, processes
from benchmarks.command_inputs import VIT, Inputs
from otter_openclip import cli
from otter_openclip.checkpoints.contents import read_file
from otter_openclip.files import write_json
from otter_openclip.replacing import replaced
from otter_openclip.training.plugin import TrainingPlugin

KINDS = ("live", "cached")
STEPS_OF_EPOCH = 250
_BATCH = 4
_DECAY = 0.999
_READINGS = 40
_COUNTS = ("files", "threads", "children", "tensors")
_MORE_MEMORY = 8 * 2**20  # once settled, bytes
_TOLERANCE = 1e-4  # of the teacher, relative to its norm: thousands of roundings of float32


class Reading(NamedTuple):
    """What the training process has after a step: bytes resident, and counts."""

    step: int
    memory: int
    files: int
    threads: int
    children: int
    tensors: int

    @classmethod
    def now(cls, step: int) -> Reading:
        """Of this process."""
        gc.collect()  # what waits for it is no growth
        return cls(
            step,
            processes.memory(os.getpid(), "VmRSS"),
            len(os.listdir("/proc/self/fd")),
            max(threading.active_count(), len(os.listdir("/proc/self/task"))),
            len(multiprocessing.active_children()),
            sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()),
        )


@dataclass
class Watch:
    """What is read while a run trains.

    Attributes:
        every: steps between two readings.
        readings: one after each ``every`` steps.
        teacher: the closed form so far, by parameter.
        steps: optimizer steps so far.
    """

    every: int
    readings: list[Reading] = field(default_factory=list)
    teacher: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    def start(self, model: nn.Module) -> None:
        """The teacher begins as a copy."""
        self.teacher = {k: v.detach().double() for k, v in model.named_parameters()}

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """After an optimizer's step and the teacher's update."""
        self.steps += 1
        n = self.steps + 1  # the reference's first update comes before its first step
        decay = min(_DECAY, (1 + n) / (10 + n))
        for name, value in model.named_parameters():
            self.teacher[name].mul_(decay).add_(value.double(), alpha=1 - decay)
        if self.steps % self.every == 0:
            self.readings.append(Reading.now(self.steps))


def run(
    inputs: Inputs,
    out: Path,
    kind: str,
    epochs: int,
    steps_of_epoch: int,
    *,
    readings: int = _READINGS,
    settled: float = 0.5,
) -> dict[str, Any]:
    """Train in this process; what was seen, with a list of ``faults``.

    Nothing may grow once ``settled`` of the steps are done.
    """
    steps = epochs * steps_of_epoch
    watch = Watch(max(1, steps // readings))
    stock_wrap, stock_update = TrainingPlugin.wrap_model, TrainingPlugin.update_teacher

    def wrap_model(plugin: TrainingPlugin, args: argparse.Namespace, model: nn.Module) -> nn.Module:
        watch.start(unwrap_model(model))
        return stock_wrap(plugin, args, model)

    def update_teacher(plugin: TrainingPlugin) -> None:
        stock_update(plugin)
        watch.step(unwrap_model(plugin._student))

    line = inputs.train_cached(out) if kind == "cached" else inputs.train(out, "--workers", "1")
    line += ["--epochs", str(epochs), "--batch-size", str(_BATCH), "--zeroshot-frequency", "0"]
    line += ["--save-frequency", "1", "--delete-previous-checkpoint"]
    line += ["--ema-decay", str(_DECAY)]
    began = time.monotonic()
    with replaced(
        (TrainingPlugin, "wrap_model", wrap_model),
        (TrainingPlugin, "update_teacher", update_teacher),
    ):
        code = cli.main(line)
    seconds = time.monotonic() - began
    folder = out / "logs" / "run"
    log = (folder / "out.log").read_text()
    entry = re.compile(r"Train Epoch: (\d+) \[ *(\d+)/")
    logged = [(int(epoch), int(seen)) for epoch, seen in entry.findall(log)]
    due = [(e, (n + 1) * _BATCH) for e in range(epochs) for n in range(steps_of_epoch)]
    first, *_, last = [r for r in watch.readings if r.step >= settled * steps]
    saved = read_file(folder / "checkpoints" / f"epoch_{epochs}.pt")["state_dict_ema"]
    away = max(
        float((saved[name].double() - value).norm() / value.norm().clamp(min=1e-12))
        for name, value in watch.teacher.items()
    )
    found = {
        "kind": kind,
        "steps": watch.steps,
        "seconds": seconds,
        "MiB settled": first.memory / 2**20,
        "MiB at end": last.memory / 2**20,
        **{name: f"{getattr(first, name)} to {getattr(last, name)}" for name in _COUNTS},
        "teacher off by": away,
        "log lines": len(logged),
    }
    faults = {
        f"exit code {code}": code != 0,
        f"{watch.steps} steps of {len(due)}": watch.steps != len(due),
        "memory grows": last.memory - first.memory > _MORE_MEMORY,
        **{f"{name} grow": getattr(last, name) > getattr(first, name) for name in _COUNTS},
        "the teacher is not the closed form": not away < _TOLERANCE,
        "lines of the log are missing": logged != due,
        "the log has what is not finite": not all(map(math.isfinite, _losses(log))),
    }
    return {**found, "faults": [name for name, there in faults.items() if there]}


def _losses(log: str) -> list[float]:
    return [float(value) for value in re.findall(r" Loss: (\S+)", log)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run both kinds; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000, help="of each kind")
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    steps_of_epoch = min(args.steps, STEPS_OF_EPOCH)
    with tempfile.TemporaryDirectory() as name:
        inputs = Inputs(Path(name) / "inputs", VIT)
        inputs.make(steps_of_epoch * _BATCH, trained=False)
        inputs = Inputs(inputs.folder, VIT)
        found = [
            run(inputs, Path(name) / kind, kind, args.steps // steps_of_epoch, steps_of_epoch)
            for kind in args.kinds
        ]
    print(common.table(found))
    if args.output is not None:
        write_json(args.output, found)
    return int(any(row["faults"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
