"""What ``fit`` takes once features exist: seconds and memory by pairs, beside its matrix products alone.

    python -m benchmarks.fit [--pairs 6000 100000 1000000]

Features are made, of widths 1,280 and 384 in float16, 10,000 pairs a file, a third of the pairs wrong.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import WIDTHS, machine, paired, paired_features, peak_memory, save, table
from otter_openclip.closed_form.blocks import BLOCK, ShardPairs
from otter_openclip.closed_form.course import Fit, Options
from otter_openclip.frozen.store import FeatureFiles

SHARD = 10_000  # pairs
SUMS, PROJECTIONS = 3, 4  # passes over the pairs: moments; similarities, for them and for judging


class Made(FeatureFiles):
    """Features of shards that are not there."""

    def path(self, shard: str) -> Path:
        """The file of a shard's number."""
        return self.folder / f"{shard}.npy"


def make(folder: Path, pairs: int) -> list[str]:
    """Write features; returns the shards."""
    shards = [str(number) for number in range(-(-pairs // SHARD))]
    for number, shard in enumerate(shards):
        sides = paired_features(min(SHARD, pairs - number * SHARD), seed=number)
        for name, rows in zip(("image", "text"), sides, strict=True):
            Made(folder / name).write(shard, rows[:, None].half().numpy())
    return shards


def products(pairs: int) -> float:
    """Seconds of the products of a fit to so many pairs: sums in float64, projections in float32."""
    rows = torch.randn(BLOCK, 1 + sum(WIDTHS), dtype=torch.float64).numpy()
    sides = [(torch.randn(BLOCK, w), torch.randn(w, min(WIDTHS))) for w in WIDTHS]

    def once() -> None:
        for _ in range(SUMS):
            rows.T @ rows
        for _ in range(PROJECTIONS):
            for features, weight in sides:
                features @ weight

    return min(paired({"products": once}, 10)["products"]) * pairs / BLOCK


def fit(folder: str, shards: list[str]) -> Callable[[], Any]:
    """A fit to the features in ``folder``, to be called."""
    sides = [Made(Path(folder) / name) for name in ("image", "text")]
    pairs = ShardPairs(*sides, shards, device=torch.device("cpu"))
    return Fit(pairs, Options()).run


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[6_000, 100_000, 1_000_000])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for count in args.pairs:
        with tempfile.TemporaryDirectory() as folder:
            measured = peak_memory(fit, folder, make(Path(folder), count))
        alone = products(count)
        row = {"pairs": count, "seconds": measured["seconds"], "products": alone}
        row["ratio"] = row["seconds"] / alone
        rows.append(row | {"added MB": measured["added"] / 2**20})
    print(table(rows))
    save("fit", {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
