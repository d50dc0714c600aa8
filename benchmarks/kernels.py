"""Sinkhorn's updates through the Triton kernel against tiles of torch products, on a GPU.

``python -m benchmarks.kernels`` needs CUDA and Triton. It prints both for float32 and bfloat16 features:
which of them is faster decides what the streaming loss should use there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch
from otter_openclip.blocks import RowTiles
from otter_openclip.objective import TeacherFeatures, float32_math

from benchmarks import common
from otter_openclip import kernels
from otter_openclip.sinkhorn import LogPlans, ScalingPlans

EPSILON, ITERATIONS = 0.15, 5


def solvers(count: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Calls that solve both plans of one batch, streaming."""
    _, _, images, texts = common.features(count, width, device, dtype)
    full = [x.float() for x in (images, texts, images, texts)]
    teacher = TeacherFeatures(*full, None, 1.0, 1.0, EPSILON, ITERATIONS, False)
    bound = 3 / EPSILON

    def tiles(*, exponential: bool) -> RowTiles:
        def fill(part: slice, out: torch.Tensor) -> None:
            teacher.similarity(part, out).sub_(bound)
            if exponential:
                out.exp_()

        return RowTiles(fill, count, count, full[0], keep=False)

    def triton() -> None:
        plans = kernels.TritonPlans(
            *(tiles(exponential=False), full[0]),
            rows=(images, texts),
            columns=(images, texts),
            coefs=(1 / EPSILON, 1 / EPSILON, 1 / EPSILON),
            shift=bound,
            diagonal=None,
            both=True,
        )
        plans.solve(ITERATIONS)

    return {
        "tiles, scaling": lambda: ScalingPlans(tiles(exponential=True), full[0], both=True).solve(
            ITERATIONS
        ),
        "tiles, log domain": lambda: LogPlans(tiles(exponential=False), full[0], both=True).solve(
            ITERATIONS
        ),
        "triton": triton,
    }


def main() -> None:
    """Print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels: error: no CUDA device here; run it on a machine with one")
    rows = []
    for count in args.counts:
        for dtype in (torch.float32, torch.bfloat16):
            with float32_math("cuda"):
                calls = solvers(count, args.width, dtype, "cuda")
                seconds = common.paired(calls, args.rounds, "cuda", f"N = {count}")
            rows += [
                {
                    "N": count,
                    "features": str(dtype).removeprefix("torch."),
                    "updates": name,
                    "seconds": statistics.median(seconds[name]),
                    "of scaling": common.ratio(seconds[name], seconds["tiles, scaling"]),
                }
                for name in calls
            ]
    print(common.table(rows))
    path = common.save("kernels", {"machine": common.machine("cuda"), "kernels": rows})
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
