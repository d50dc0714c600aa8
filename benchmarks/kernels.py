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

from benchmarks import common
from otter_openclip import OtterLoss
from otter_openclip.fast import engine
from otter_openclip.precision import float32_math

ITERATIONS = 5


def solvers(count: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Calls that solve both plans of one batch, streaming: tiles in both forms, and Triton."""
    _, _, images, texts = common.features(count, width, device, dtype)
    teacher = (images, texts)

    def solve(epsilon: float, half: torch.dtype | None) -> None:
        loss = OtterLoss(epsilon=epsilon, iterations=ITERATIONS)
        engine._solved_plans(loss, teacher, 0, False, half)

    return {
        "tiles, scaling": lambda: solve(0.15, None),
        "tiles, log domain": lambda: solve(0.05, None),
        "triton": lambda: solve(0.15, torch.bfloat16),
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
