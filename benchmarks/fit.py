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

import numpy as np
import torch

from benchmarks.common import machine, paired, peak_memory, save, table
from otter_openclip.closed_form.blocks import BLOCK, ShardPairs
from otter_openclip.closed_form.course import Fit, Options
from otter_openclip.frozen.store import FeatureFiles

WIDTHS, SHARED, SHARD = (1280, 384), 64, 10_000
SUMS, PROJECTIONS = 3, 4  # passes over the pairs: moments; similarities, for them and for judging


class Made(FeatureFiles):
    """Features of shards that are not there."""

    def path(self, shard: str) -> Path:
        """The file of a shard's number."""
        return self.folder / f"{shard}.npy"


def make(folder: Path, pairs: int) -> list[str]:
    """Write features; returns the shards."""
    rng = np.random.default_rng(0)
    mixing = [rng.normal(size=(SHARED, width)).astype(np.float32) for width in WIDTHS]
    shards = []
    for begin in range(0, pairs, SHARD):
        count = min(SHARD, pairs - begin)
        topics = rng.normal(size=(count, SHARED)).astype(np.float32)
        shards.append(str(begin // SHARD))
        for name, mix in zip(("image", "text"), mixing, strict=True):
            noise = rng.standard_normal((count, mix.shape[1]), dtype=np.float32)
            rows = topics @ mix + 8 * noise
            Made(folder / name).write(shards[-1], rows[:, None].astype(np.float16))
            topics[: count // 3] = np.roll(topics[: count // 3], 1, axis=0)
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
