"""The study of ``docs/evidence.md``: ``otter-openclip compare`` over pairs and noise.

    python -m benchmarks.evidence --output OUT --model local-dir:TOWERS --data NAME=PAIRS,EVAL ...
        [--pairs 1500 3000 6000] [--noise 0 0.2 0.4] [--trials N] [--seeds N] [--quick]

Pairs are drawn as by ``benchmarks.closed_form`` with seed 0. It goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import draw, machine, save, table
from otter_openclip.compare import LOSSES
from otter_openclip.compare.comparing import compare
from otter_openclip.compare.trial import METRICS
from otter_openclip.shards import read
from otter_openclip.shards.write import write_shard

SHARD = 1000  # pairs


def write_pairs(source: str, out: Path, pairs: int, noise: float) -> str:
    """Shards of so many pairs from those in the folder ``source``, a share with another's caption."""
    shards = sorted(map(str, Path(source).glob("*.tar")))
    samples = [files for shard in shards for _, files in read.samples(shard)]
    if len(samples) < pairs:
        raise SystemExit(f"--pairs {pairs}: {source} has {len(samples)}")
    drawn = draw(len(samples), pairs, noise, 0)
    count = -(-pairs // SHARD)
    out.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        if (path := out / f"{number:05d}.tar").exists():  # features of it are known by its time
            continue
        part = list(enumerate(drawn))[number * SHARD : (number + 1) * SHARD]
        write_shard(
            path,
            (
                (f"{place:06d}", {**samples[image], "txt": samples[caption]["txt"]})
                for place, (image, caption) in part
            ),
        )
    return str(out / f"{{{0:05d}..{count - 1:05d}}}.tar")


def rows(cell: dict[str, Any], results: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each method of a comparison."""
    lines = []
    for row in sorted(results["rows"], key=lambda row: -row["mAP"][0]):
        line = {**cell, "method": row["label"]}
        line |= {metric: f"{row[metric][0]:.1f}" for metric in METRICS}
        if "difference" in row:
            mean, deviation = row["difference"]
            line["mAP less InfoNCE's"] = (
                f"{mean:+.1f} ± {deviation:.1f} ({row['ahead']}/{row['of']})"
            )
        lines.append(line | {"steps": row["setting"]["steps"]})
    return lines


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=PAIRS,EVAL")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1500, 3000, 6000])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.2, 0.4])
    parser.add_argument("--trials", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    budget = {"trials": args.trials, "seeds": args.seeds, "quick": args.quick}
    studies, lines = [], []
    for entry in args.data:
        name, _, places = entry.partition("=")
        source, _, labelled = places.partition(",")
        for pairs in args.pairs:
            for noise in args.noise:
                out = args.output / f"{name}-{pairs}-{round(100 * noise)}"
                shards = write_pairs(source, args.output / "shards" / out.name, pairs, noise)
                compare(
                    out,
                    model=args.model,
                    train_data=shards,
                    eval=labelled,
                    losses=LOSSES,
                    **budget,
                )
                results = json.loads((out / "results.json").read_text(encoding="utf-8"))
                cell = {"data": name, "pairs": pairs, "wrong": f"{noise:.0%}"}
                studies.append(cell | results)
                lines += rows(cell, results)
                save("evidence", {"machine": machine(), "studies": studies})
    print(table(lines))


if __name__ == "__main__":
    main()
