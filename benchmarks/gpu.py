"""Everything that is claimed of a GPU, measured against the card's own floors; a short table last.

``python -m benchmarks.gpu`` takes some minutes; ``--parts`` names some of its parts, to stay below a
time limit, and ``--device cpu --quick`` tries the script itself. Each part's results are kept in
``benchmarks/results/gpu.json`` as soon as it is done. What is right is not measured here but tested:
``pytest tests/test_gpu.py tests/test_losses.py tests/test_teacher.py``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import common, kernels, loss, step
from otter_openclip import EmaTeacher, OtterLoss
from otter_openclip.numerics import float32_math
from otter_openclip.training.student_with_teacher import StudentWithTeacher, as_teacher

Rows = list[dict[str, Any]]
DTYPES = (torch.float32, torch.bfloat16)
STEPS = {"RN50": (256, 512), "ViT-B-32": (256, 1024), "ViT-B-16": (256, 512)}
MILLION = 2**20
PRODUCTS_GOAL, STEP_GOAL, EMA_GOAL, CACHED_GOAL = 2.0, 1.36, 0.01, 50.0


class Bench:
    """One device, and how large and often things are measured on it."""

    def __init__(self, device: str, *, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.rounds = 2 if quick else 9

    def median(self, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each call, taken in turn."""
        found = common.paired(calls, self.rounds, self.device)
        return {name: statistics.median(seconds) for name, seconds in found.items()}

    def floors(self) -> Rows:
        """Copy bandwidth, and matrix products as the losses have them and in bfloat16."""
        entries, n = (2**22, 512) if self.quick else (2**28, 8192)
        source, target = torch.empty(2, entries, device=self.device)
        rows = []
        for dtype in DTYPES:
            left, right = torch.randn(2, n, n, device=self.device).to(dtype)
            out = torch.empty_like(left)
            torch.set_float32_matmul_precision("highest")
            seconds = self.median({"mm": lambda a=left, b=right, c=out: torch.mm(a, b, out=c)})
            name = str(dtype).removeprefix("torch.")
            rows.append(
                {"floor": f"{name} product, TFLOP/s", "value": 2e-12 * n**3 / seconds["mm"]}
            )
        seconds = self.median({"copy": lambda: target.copy_(source)})
        rows.append({"floor": "copy, GB/s", "value": 8e-9 * entries / seconds["copy"]})
        return rows

    def losses(self) -> Rows:
        """Forward and backward of a batch beside the published formulas and open_clip's losses."""
        counts = (128, 256) if self.quick else (512, 2048, 8192, 16384, 32768, 65536, 131072)
        rows = []
        for width in (512,) if self.quick else (512, 768):
            loss.WIDTH = width
            for dtype in DTYPES:
                for count in counts:
                    rows += self._losses(count, width, dtype)
                    print(common.table(rows[-5:]), flush=True)
        return rows

    def _losses(self, count: int, width: int, dtype: torch.dtype) -> Rows:
        rows = []
        product = common.product_rate(count, min(count, 16384), width, self.device)
        product *= count / min(count, 16384)
        for name in ("plain", "dense", "streaming", "clip", "distill"):
            matrix = 4 * count * count
            # Of those that hold matrices some ten are alive at once.
            if name != "streaming" and 10 * matrix > self._memory():
                continue
            call = loss.contestant(name, count, self.device, dtype)
            held = common.peak_memory(
                loss.contestant, name, count, self.device, dtype, device=self.device
            )
            seconds = self.median({name: call})[name]
            needed = {"dense": loss.DENSE_PRODUCTS, "streaming": loss.streaming_products(5)}
            rows.append(
                {
                    "N": count,
                    "D": width,
                    "features": str(dtype).removeprefix("torch."),
                    "loss": name,
                    "ms": 1e3 * seconds,
                    "MB": held["added"] / 1e6,
                    "of its products": seconds / (needed[name] * product)
                    if name in needed
                    else None,
                }
            )
            del call
        return rows

    def _memory(self) -> float:
        if self.device == "cpu":
            return 4e9
        return torch.cuda.get_device_properties(self.device).total_memory

    def plan(self) -> Rows:
        """The plan alone beside POT, geomloss and FlashSinkhorn, at equal marginal error."""
        count = 256 if self.quick else 8192
        rows = loss.plan_alone(count, self.rounds, device=self.device)
        calls = kernels.solvers(count, loss.WIDTH, torch.float32, self.device)
        first = rows[0]["seconds"]
        with float32_math(self.device.split(":")[0]):
            for name, seconds in self.median(calls).items():
                # The solvers alone, both directions' plans from one kernel; no plan is written out.
                row = {"plan": f"streaming, {name}", "seconds": seconds, "of ours": seconds / first}
                rows.append({"N": count, **row, "marginal error": None})
        return rows

    def million(self) -> Rows:
        """The streaming loss where one matrix would take 4 TB."""
        count = 2048 if self.quick else MILLION
        return [loss.large(count, self.device, torch.bfloat16)]

    def steps(self) -> Rows:
        """A training step of OTTER over CLIP, with its parts: the EMA's update among them."""
        models = {"RN50": (2,)} if self.quick else STEPS
        precision = "fp32" if self.quick else "amp_bf16"
        rows = []
        for name, batches in models.items():
            for batch in batches:
                rows += step.compare(name, batch, self.rounds, self.device, precision)
                print(common.table(rows[-6:]), flush=True)
        return rows

    def cached(self) -> Rows:
        """Steps a second on cached features: linear heads on both towers, with the EMA teacher."""
        batch, width = (256, 64) if self.quick else (32768, 512)
        one = _HeadsStep(batch, width, self.device)
        seconds = self.median({"step": one})["step"]
        return [{"batch": batch, "width": width, "steps/s": 1 / seconds, "ms": 1e3 * seconds}]


class _Heads(nn.Module):
    """What is left of a model whose towers are frozen and cached."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.visual, self.text = nn.Linear(width, width), nn.Linear(width, width)
        self.logit_scale = nn.Parameter(torch.tensor(3.9))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": F.normalize(self.visual(images), dim=1),
            "text_features": F.normalize(self.text(texts), dim=1),
            "logit_scale": self.logit_scale.exp(),
        }


class _HeadsStep:
    def __init__(self, batch: int, width: int, device: str) -> None:
        given = common.features(batch, width, device)
        self.images, self.texts = given[:2]
        self.student = _Heads(width).to(device)
        self.loss = OtterLoss().to(device)
        self.teacher = EmaTeacher(self.student)
        self.model = StudentWithTeacher(self.student, as_teacher(self.teacher.module)).train()
        self.device = device
        parameters = [*self.student.parameters(), *self.loss.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.split(":")[0], torch.bfloat16):
            terms = self.loss(**self.model(self.images, self.texts), output_dict=True)
        sum(terms.values()).backward()
        self.optimizer.step()
        self.teacher.update(self.student)


PARTS = ("floors", "losses", "plan", "million", "steps", "cached")


def summary(results: dict[str, Rows]) -> Rows:
    """Each goal, what was measured for it, and whether it is met."""
    rows = []

    def goal(name: str, value: float, bound: float, *, at_least: bool = False) -> None:
        met = value >= bound if at_least else value <= bound
        sign = ">=" if at_least else "<="
        rows.append({"what": name, "measured": value, "goal": f"{sign} {bound}", "met": met})

    for row in results.get("losses", []):
        if row["loss"] == "streaming" and row["N"] >= 16384:
            name = f"loss, N {row['N']}, D {row['D']}, {row['features']}: of its products"
            goal(name, row["of its products"], PRODUCTS_GOAL)
    for row in results.get("steps", []):
        name = f"{row['model']}, batch {row['batch']}"
        if row["what"] == "step, --loss otter":
            goal(f"{name}: step of OTTER over CLIP", row["of clip"], STEP_GOAL)
        if row["what"] == "EMA update":
            goal(f"{name}: EMA over a step", row["of clip"], EMA_GOAL)
    for row in results.get("cached", []):
        name = f"cached features, batch {row['batch']}: steps a second"
        goal(name, row["steps/s"], CACHED_GOAL, at_least=True)
    return rows


def main() -> None:
    """Measure the parts asked for; print each, the goals last, and write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--name", default="gpu", help="of the file in benchmarks/results")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here; --device cpu --quick tries the script")
    path = common.RESULTS / f"{args.name}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = common.machine(args.device)
    bench = Bench(args.device, quick=args.quick)
    for part in args.parts:
        print(f"\n{part}", flush=True)
        results[part] = getattr(bench, part)()
        print(common.table(results[part]), flush=True)
        common.save(args.name, results)
        if args.device != "cpu":
            torch.cuda.empty_cache()
    if rows := summary(results):
        print(f"\nGoals\n{common.table(rows)}\nWrote {path}")


if __name__ == "__main__":
    main()
