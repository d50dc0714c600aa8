"""The loss step alone: forward and backward of one batch's features, time and memory over N.

``python -m benchmarks.loss`` compares, in one process and in turn,

* ``plain``: ``OtterLoss(impl="plain")``, the published formulas written out;
* ``dense`` and ``streaming``: the same loss by the other implementations;
* ``clip`` and ``distill``: open_clip's ``ClipLoss`` and ``DistillClipLoss``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from open_clip.loss import ClipLoss, DistillClipLoss

from benchmarks import common
from otter_openclip import OtterLoss

WIDTH = 512
LOSSES = ("plain", "dense", "streaming", "clip", "distill")


def contestant(name: str, count: int, device: str, dtype: torch.dtype) -> Callable[[], float]:
    """One forward and backward of the named loss."""
    images, texts, teacher_images, teacher_texts = common.features(count, WIDTH, device, dtype)
    images.requires_grad_(), texts.requires_grad_()
    scale = torch.tensor(30.0, device=device, requires_grad=True)
    distill = torch.tensor(49.4, device=device, requires_grad=True)
    teacher = (teacher_images, teacher_texts)
    if name in ("plain", "dense", "streaming"):
        loss = OtterLoss(impl=name).to(device)

    def total() -> Any:
        if name == "clip":
            return ClipLoss()(images.float(), texts.float(), scale)
        if name == "distill":
            student = (x.float() for x in (images, texts))
            return sum(DistillClipLoss()(*student, scale, *(x.float() for x in teacher), distill))
        return sum(loss(images, texts, scale, *teacher))

    def call() -> float:
        for leaf in (images, texts, scale, distill):
            leaf.grad = None
        value = total()
        value.backward()
        return value

    return call


def compare(
    counts: list[int], rounds: int, device: str, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A row per N and contestant."""
    rows = []
    for count in counts:
        calls = {name: contestant(name, count, device, dtype) for name in LOSSES}
        turns = rounds if count < 8192 else min(rounds, 3 if count < 16384 else 1)
        seconds = common.paired(calls, turns, device, f"N = {count}")
        memory = {
            name: common.peak_memory(contestant, name, count, device, dtype, device=device)["added"]
            for name in LOSSES
        }
        for name in LOSSES:
            rows.append(
                {
                    "N": count,
                    "loss": name,
                    "seconds": statistics.median(seconds[name]),
                    "of plain": common.ratio(seconds[name], seconds["plain"]),
                    "MB": memory[name] / 1e6,
                    "MB of plain": memory[name] / memory["plain"],
                }
            )
        del calls
        print(common.table(rows[-len(LOSSES) :]), flush=True)
    return rows


def main() -> None:
    """Print the tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = [512, 1024, 2048, 4096, 8192, 16384]
    text = "N, any number of them"
    parser.add_argument("--counts", type=int, nargs="*", default=sizes, help=text)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--name", default="loss", help="of the file in benchmarks/results")
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": common.machine(args.device), "D": WIDTH}
    results["dtype"] = args.dtype
    results["loss"] = compare(args.counts, args.rounds, args.device, getattr(torch, args.dtype))
    print(f"Wrote {common.save(args.name, results)}")


if __name__ == "__main__":
    main()
