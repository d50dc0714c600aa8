"""Everything that is claimed of a GPU, beside the card's own floors; a short table of goals last.

    python -m benchmarks.gpu [--parts floors losses steps heads fit]

takes some minutes; ``--device cpu --quick`` tries the script itself. Each part's results are written as
soon as it is done. What is right is not measured here but tested: ``pytest tests/test_gpu.py
tests/test_losses.py tests/test_teacher.py``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import common, loss, step
from otter_openclip import EmaTeacher, OtterLoss
from otter_openclip.closed_form.blocks import ArrayPairs
from otter_openclip.closed_form.course import Fit, Options

Rows = list[dict[str, Any]]
STEPS = {"RN50": (256, 512), "ViT-B-32": (256, 1024), "ViT-B-16": (256, 512)}
# Products of N x N x D: cosines, both gradients and the teacher's two similarities; streaming makes the
# teacher's anew in each of five iterations and in both passes, and the cosines twice.
PRODUCTS = {"dense": 5, "streaming": 2 * 5 + 2 * 3 + 2}


class Bench:
    """One device, and how large and often things are measured on it."""

    def __init__(self, device: str, *, quick: bool) -> None:
        self.device, self.quick, self.rounds = device, quick, 2 if quick else 7

    def median(self, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each call, taken in turn."""
        taken = common.paired(calls, self.rounds, self.device)
        return {name: statistics.median(seconds) for name, seconds in taken.items()}

    def floors(self) -> Rows:
        """Copy bandwidth, and products in float32 and bfloat16."""
        entries, n = (2**22, 512) if self.quick else (2**28, 8192)
        source, target = torch.empty(2, entries, device=self.device)
        seconds = self.median({"copy": lambda: target.copy_(source)})["copy"]
        rows = [{"floor": "copy, GB/s", "value": 8e-9 * entries / seconds}]
        for dtype in (torch.float32, torch.bfloat16):
            left, right = torch.randn(2, n, n, device=self.device).to(dtype)
            seconds = self.median({"mm": lambda a=left, b=right: a @ b})["mm"]
            rows.append({"floor": f"{dtype} product, TFLOP/s", "value": 2e-12 * n**3 / seconds})
        return rows

    def losses(self) -> Rows:
        """Forward and backward of a batch's features: ours, the published formulas, open_clip's."""
        counts = (128, 256) if self.quick else (512, 2048, 8192, 16384, 32768, 65536, 131072)
        rows = []
        for count in counts:
            edge = min(count, 16384)
            product = common.product_rate(edge, edge, loss.WIDTH, self.device) * (count / edge) ** 2
            for name in loss.LOSSES:
                # Of those that hold matrices some ten are alive at once.
                if name != "streaming" and 40 * count * count > self._memory():
                    continue
                call = loss.contestant(name, count, self.device, torch.float32)
                row = {"N": count, "loss": name, "ms": 1e3 * self.median({name: call})[name]}
                products = PRODUCTS.get(name)
                row["of its products"] = products and row["ms"] / (1e3 * products * product)
                rows.append(row)
                del call
        return rows

    def _memory(self) -> float:
        if self.device == "cpu":
            return 4e9
        return torch.cuda.get_device_properties(self.device).total_memory

    def steps(self) -> Rows:
        """A training step of OTTER, with the EMA and as its own teacher, over CLIP's."""
        models = {"RN50": (2,)} if self.quick else STEPS
        precision = "fp32" if self.quick else "amp_bf16"
        return [
            row
            for name, batches in models.items()
            for batch in batches
            for row in step.compare(name, batch, self.rounds, self.device, precision)
        ]

    def heads(self) -> Rows:
        """Steps a second of linear heads on kept features that are on the device already."""
        batch, width = (256, 64) if self.quick else (32768, 512)
        seconds = self.median({"step": HeadsStep(batch, width, self.device)})["step"]
        return [{"batch": batch, "width": width, "steps/s": 1 / seconds}]

    def fit(self) -> Rows:
        """The closed form of pairs that are on the device already."""
        rows = []
        for pairs in (2_000,) if self.quick else (100_000, 3_000_000):
            weights = torch.ones(pairs, dtype=torch.float64, device=self.device)
            arrays = ArrayPairs(*common.paired_features(pairs, self.device), weights)
            common.synchronize(self.device)
            began = time.perf_counter()
            _, found = Fit(arrays, Options()).run()
            common.synchronize(self.device)
            rows.append({"pairs": pairs, "seconds": time.perf_counter() - began})
            rows[-1]["wrong"] = found.wrong.share
        return rows


class Heads(nn.Module):
    """What is left of a model whose towers are frozen and whose features are kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.visual, self.text = nn.Linear(width, width), nn.Linear(width, width)
        self.logit_scale = nn.Parameter(torch.tensor(3.9))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Features and scale, as open_clip's models give them."""
        return {
            "image_features": F.normalize(self.visual(images), dim=1),
            "text_features": F.normalize(self.text(texts), dim=1),
            "logit_scale": self.logit_scale.exp(),
        }


class HeadsStep:
    """A step of OTTER with its EMA teacher, in bfloat16 autocast."""

    def __init__(self, batch: int, width: int, device: str) -> None:
        self.batch, self.kind = common.features(batch, width, device)[:2], device.split(":")[0]
        self.model, self.loss = Heads(width).to(device), OtterLoss().to(device)
        self.teacher = EmaTeacher(self.model)
        parameters = [*self.model.parameters(), *self.loss.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def __call__(self) -> None:
        """Train one step."""
        self.optimizer.zero_grad()
        with torch.autocast(self.kind, torch.bfloat16):
            outputs = {**self.model(*self.batch), **self.teacher(*self.batch)}
            terms = self.loss(**outputs, output_dict=True)
        sum(terms.values()).backward()
        self.optimizer.step()
        self.teacher.update(self.model)


PARTS = ("floors", "losses", "steps", "heads", "fit")


def goals(results: dict[str, Rows]) -> Rows:
    """Each goal, what was measured for it, and whether it is met."""
    table = [
        (f"{row['loss']}, N {row['N']}: of its products", row["of its products"], "<=", 2.0)
        for row in results.get("losses", [])
        if row["loss"] in PRODUCTS and row["N"] >= 16384
    ]
    bounds = {"step, --loss otter": 1.36, f"step, --loss {step.OWN}": 1.03}
    table += [
        (f"{row['model']}, batch {row['batch']}, {row['what']}", row["of clip"], "<=", bound)
        for row in results.get("steps", [])
        if (bound := bounds.get(row["what"]))
    ]
    table += [
        (f"kept features, batch {row['batch']}: steps/s", row["steps/s"], ">=", 50.0)
        for row in results.get("heads", [])
    ]
    table += [
        (f"fit of {row['pairs']:,} pairs: seconds", row["seconds"], "<=", 10.0)
        for row in results.get("fit", [])
    ]
    return [
        {
            "what": what,
            "measured": value,
            "goal": f"{sign} {bound:g}",
            "met": value <= bound if sign == "<=" else value >= bound,
        }
        for what, value, sign, bound in table
    ]


def main() -> None:
    """Measure the parts asked for; print each, the goals last."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--name", default="gpu", help="of the file in benchmarks/results")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here; --device cpu --quick tries the script")
    path = common.RESULTS / f"{args.name}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results["machine"] = common.machine(args.device)
    bench = Bench(args.device, quick=args.quick)
    for part in args.parts:
        print(f"\n{part}", flush=True)
        results[part] = getattr(bench, part)()
        print(common.table(results[part]), flush=True)
        common.save(args.name, results)
    print(f"\n{common.table(goals(results))}")


if __name__ == "__main__":
    main()
