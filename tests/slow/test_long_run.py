"""Thousands of steps of a tiny model: nothing piles up, the teacher does not drift, all is logged.

After each step the student goes into the closed form of the EMA teacher, the sum of all students
under the weights of the decays min(d, (1 + n) / (10 + n)), in float64; in the end the teacher in the
checkpoint is compared with it. OTTER_STEPS is the number of steps of each run.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import re
import threading
from pathlib import Path

import pytest
from torch import Tensor
from training_helpers import load, train

from otter_openclip import EmaTeacher
from otter_openclip.model_folders.towers import make_towers

pytestmark = pytest.mark.slow
EPOCH = 18  # steps: 72 pairs
EPOCHS = max(4, int(os.environ.get("OTTER_STEPS", 900)) // EPOCH)
MORE_MEMORY = 8 * 2**20  # bytes, from the middle to the end
LOCKS = ("--lock-image", "--lock-text", "--lock-text-freeze-layer-norm", "--feature-cache")


def reading() -> dict[str, int]:
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {
        "memory": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": max(threading.active_count(), len(os.listdir("/proc/self/task"))),
        "children": len(multiprocessing.active_children()),
        "tensors": sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()),
    }


@pytest.mark.parametrize("kind", ["live", "cached"])
def test_nothing_piles_up(kind, pairs, towers, tmp_path, monkeypatch):
    teacher, readings, stock_update = {}, [], EmaTeacher.update

    def update(self, model):
        if not teacher:
            teacher.update({k: v.detach().double() for k, v in self.module.named_parameters()})
        stock_update(self, model)
        readings.append(reading() if len(readings) % EPOCH == 0 else readings[-1])
        n = len(readings) + 1  # the reference's first update comes before its first step
        decay = min(0.999, (1 + n) / (10 + n))
        for name, value in model.named_parameters():
            teacher[name].mul_(decay).add_(value.detach().double(), alpha=1 - decay)

    monkeypatch.setattr(EmaTeacher, "update", update)
    model = make_towers(tmp_path / "model", image_size=32, context_length=8, **towers)
    line = ["--loss", "otter", "--model", f"local-dir:{model}", "--epochs", str(EPOCHS)]
    line += ["--batch-size", "4", "--delete-previous-checkpoint", "--ema-decay", "0.999"]
    if kind == "cached":
        line += [*LOCKS, str(tmp_path / "features")]
    checkpoints = train(pairs, tmp_path, *line)

    assert len(readings) == EPOCHS * EPOCH
    middle, end = readings[len(readings) // 2], readings[-1]
    assert end.pop("memory") - middle.pop("memory") < MORE_MEMORY
    assert {k: (v, middle[k]) for k, v in end.items() if v > middle[k]} == {}
    saved = load(checkpoints / f"epoch_{EPOCHS}.pt")["state_dict_ema"]
    for name, value in teacher.items():
        assert (saved[name].double() - value).norm() <= 1e-4 * value.norm() + 1e-12, name
    log = (tmp_path / "run" / "out.log").read_text(encoding="utf-8")
    steps = re.findall(r"Train Epoch: (\d+) \[ *(\d+)/.* Loss: (\S+)", log)
    due = [(e, 4 * (n + 1)) for e in range(EPOCHS) for n in range(EPOCH)]
    assert [(int(epoch), int(samples)) for epoch, samples, _ in steps] == due
    assert all(math.isfinite(float(loss)) for *_, loss in steps)
