"""A whole training step of ``--loss otter`` against ``--loss clip``, in turn in one process.

All are what the training command runs for a batch that is already on the device: forward under its
autocast, loss, backward, optimizer and, for OTTER, the EMA teacher. Its floor is 4/3: a step of CLIP is
about three forwards, and the teacher adds one, but not with ``--ema-decay 0``.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import open_clip
import torch
from open_clip.loss import ClipLoss
from open_clip_train.precision import get_autocast

from benchmarks import common
from otter_openclip import OtterLoss
from otter_openclip.training.student_with_teacher import MovingAverage, StudentWithTeacher, Teacher

OWN = "otter --ema-decay 0"


class Step:
    """One model trained with one loss."""

    def __init__(self, loss: str, name: str, batch: int, device: str, precision: str) -> None:
        torch.manual_seed(0)
        model = open_clip.create_model(name, device=device, output_dict=True)
        size = model.visual.image_size
        height, width = size if isinstance(size, tuple) else (size, size)
        self.images = torch.randn(batch, 3, height, width, device=device)
        self.texts = torch.randint(1, 400, (batch, model.context_length), device=device)
        self.autocast = get_autocast(precision, device_type=torch.device(device).type)
        self.student = model
        self.optimizer = torch.optim.SGD(self.build(loss, device), lr=1e-4, momentum=0.9)

    def build(self, loss: str, device: str) -> list[torch.nn.Parameter]:
        """Make loss, teacher and what is trained; returns all parameters."""
        self.teacher = Teacher()
        self.loss, self.model = ClipLoss(), self.student
        if loss != "clip":
            self.loss = OtterLoss().to(device)
            if loss == "otter":
                args = argparse.Namespace(ema_decay=0.999)
                self.teacher = MovingAverage(args, self.student, {}, eval_mode=False)
            self.model = StudentWithTeacher(self.student, self.teacher)
        self.model.train()
        return [*self.student.parameters(), *self.loss.parameters()]

    def forward(self) -> torch.Tensor:
        """Loss of the batch."""
        with self.autocast():
            return sum(self.loss(**self.model(self.images, self.texts), output_dict=True).values())

    def __call__(self) -> None:
        """Train one step."""
        self.optimizer.zero_grad()
        self.forward().backward()
        self.optimizer.step()
        if self.teacher.ema is not None:
            self.teacher.ema.update(self.student)
        with torch.no_grad():
            self.student.logit_scale.clamp_(0, math.log(100))

    def parts(self) -> dict[str, Callable[[], Any]]:
        """What OTTER adds to a step, piece by piece."""
        features = [torch.randn(len(self.images), 512, device=self.images.device) for _ in range(4)]
        features = [torch.nn.functional.normalize(x, dim=1).requires_grad_() for x in features]
        scale = torch.tensor(14.0, device=self.images.device)

        def teach() -> None:
            with self.autocast():
                self.teacher.features(self.images, self.texts)

        def student() -> None:
            with self.autocast(), torch.no_grad():
                self.student(self.images, self.texts)

        return {
            "teacher forward": teach,
            "student forward, no gradient": student,
            "loss": lambda: sum(self.loss(*features[:2], scale, *features[2:])).backward(),
            "EMA update": lambda: self.teacher.ema.update(self.student),
        }


def compare(
    name: str, batch: int, rounds: int, device: str, precision: str
) -> list[dict[str, Any]]:
    """Rows for the two steps and for OTTER's additions."""
    steps = {loss: Step(loss, name, batch, device, precision) for loss in ("clip", "otter", OWN)}
    seconds = common.paired(dict(steps), rounds, device, f"{name}, steps")
    parts = common.paired(steps["otter"].parts(), rounds, device, f"{name}, parts")
    clip = statistics.median(seconds["clip"])
    rows = [
        {
            "model": name,
            "batch": batch,
            "what": f"step, --loss {loss}",
            "seconds": statistics.median(seconds[loss]),
            "of clip": common.ratio(seconds[loss], seconds["clip"]),
        }
        for loss in steps
    ]
    for part, taken in parts.items():
        median = statistics.median(taken)
        rows.append(
            {
                "model": name,
                "batch": batch,
                "what": part,
                "seconds": median,
                "of clip": median / clip,
            }
        )
    return rows


def main() -> None:
    """Print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["RN50", "ViT-B-32"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--name", default="step", help="of the file in benchmarks/results")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.models:
        rows += compare(name, args.batch, args.rounds, args.device, args.precision)
    print(common.table(rows))
    results = {
        "machine": common.machine(args.device),
        "open_clip": open_clip.__version__,
        "precision": args.precision,
        "step": rows,
    }
    print(f"Wrote {common.save(args.name, results)}")


if __name__ == "__main__":
    main()
