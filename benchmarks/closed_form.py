"""The closed form on photos: without and with weights, transport and unpaired data, by pairs and noise.

    python -m benchmarks.closed_form --output OUT --towers FOLDER --data NAME=PAIRS,EVAL ... \\
        --transfer NAME=EVAL

Pairs are drawn as for ``docs/evidence.md``, and figures are of the same half of the images, so
that rows of one seed are of the same pairs. Nothing is chosen by labels. It goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common import RESULTS, draw
from otter_openclip import fit_heads
from otter_openclip.closed_form.blocks import ShardPairs
from otter_openclip.closed_form.two_towers import Towers
from otter_openclip.closed_form.validation import LabelledFeatures
from otter_openclip.compare.findings import mean_deviation
from otter_openclip.compare.trial import METRICS
from otter_openclip.evaluation.metrics import multilabel_metrics
from otter_openclip.files import write_json
from otter_openclip.frozen.encode import fill

PAIRS, NOISE, SEEDS = (1500, 3000, 6000), (0.0, 0.2, 0.4), 5
UNPAIRED = 2000  # images, and captions of other pictures
METHODS: dict[str, dict[str, Any]] = {
    "closed form": {"weights": False},
    "with weights": {},
    "with transport of the pairs": {"transport_pairs": True},
    "with unpaired data": {},
}


class Cell(NamedTuple):
    """One fit."""

    data: str
    pairs: int
    noise: float
    seed: int
    method: str


class Half:
    """The reported half of labelled pictures."""

    def __init__(self, labelled: LabelledFeatures) -> None:
        order = np.random.default_rng(0).permutation(len(labelled.images))
        rows = np.sort(np.array_split(order, 2)[1])
        self.images, self.labelled = labelled.images[torch.from_numpy(rows)], labelled
        self.labels = [labelled.labels[row] for row in rows]
        shown = {int(label) for labels in self.labels for label in labels}
        self.share = len(shown) / len(labelled.counts)

    def metrics(self, heads: Any) -> dict[str, float]:
        """In percent; ``mAP`` is over classes that have images in the half."""
        classes = self.labelled.classes(heads)
        values = multilabel_metrics(heads.images(self.images), classes, self.labels)
        values |= {METRICS["mAP"]: values[METRICS["mAP"]] / self.share}
        return {name: 100 * values[long] for name, long in METRICS.items()}


def cells(data: list[str], seeds: int) -> Iterator[Cell]:
    """All of them, seed by seed."""
    for seed in range(seeds):
        for name in data:
            for pairs in PAIRS:
                for noise in NOISE:
                    for method in METHODS:
                        if method != "with unpaired data" or pairs + 2 * UNPAIRED <= max(PAIRS):
                            yield Cell(name, pairs, noise, seed, method)


def fit(cell: Cell, images: torch.Tensor, texts: torch.Tensor) -> Any:
    """The heads of a cell."""
    drawn = torch.tensor(draw(len(images), cell.pairs, cell.noise, cell.seed))
    options = dict(METHODS[cell.method])
    if cell.method == "with unpaired data":
        others = torch.tensor(draw(len(images), len(images), 0, cell.seed))[cell.pairs :, 0]
        options["unpaired_images"] = images[others[:UNPAIRED]]
        options["unpaired_texts"] = texts[others[UNPAIRED : 2 * UNPAIRED]]
    return fit_heads(images[drawn[:, 0]], texts[drawn[:, 1]], **options)


def tuned(data: str) -> dict[tuple[int, float], list[str]]:
    """Of the tuned losses, from the study of ``docs/evidence.md``: mAP/F@1/F@5 of InfoNCE and OTTER."""
    study = json.loads((RESULTS / "data_efficiency.json").read_text(encoding="utf-8"))
    rows = [*study["final"], *study["tuned elsewhere"]["coco-to-imagenet, tuned on coco"]]
    found = {(r["data"], r["pairs"], r["noise"], r["loss"]): r for r in rows}
    return {
        (pairs, noise): [
            "/".join(f"{found[key][m][0]:.1f}" for m in METRICS) if key in found else ""
            for key in ((data, pairs, noise, loss) for loss in ("infonce", "otter"))
        ]
        for pairs in PAIRS
        for noise in NOISE
    }


def table(results: dict[str, Any], data: str) -> list[str]:
    """Means over the seeds, mAP/F@1/F@5, a row for each cell."""
    heads = ["InfoNCE", "OTTER", *METHODS]
    lines = [f"| {data}: pairs, wrong | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    others = tuned(data)
    for pairs in PAIRS:
        for noise in NOISE:
            row = list(others[pairs, noise])
            for method in METHODS:
                keys = [json.dumps((data, pairs, noise, seed, method)) for seed in range(SEEDS)]
                runs = [results[key] for key in keys if key in results]
                means = [f"{statistics.mean(r[m] for r in runs):.1f}" for m in METRICS if runs]
                row.append("/".join(means))
            lines.append(f"| {pairs:,}, {noise:.0%} | {' | '.join(row)} |")
    return lines


def shares(results: dict[str, Any], data: list[str]) -> list[str]:
    """The estimated shares of wrong pairs, mean and deviation, by pairs and true share."""
    lines = [f"| wrong | {' | '.join(f'{n}, {p:,}' for n in data for p in PAIRS)} |"]
    lines.append("| --- " * (len(data) * len(PAIRS) + 1) + "|")
    for noise in NOISE:
        row = []
        for name in data:
            for pairs in PAIRS:
                keys = (json.dumps((name, pairs, noise, s, "with weights")) for s in range(SEEDS))
                values = [100 * results[key]["wrong"] for key in keys if key in results]
                shown = "{:.1f} ± {:.1f}%".format(*mean_deviation(values)) if values else ""
                row.append(shown)
        lines.append(f"| {noise:.0%} | {' | '.join(row)} |")
    return lines


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--towers", required=True)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=PAIRS,EVAL")
    parser.add_argument("--transfer", metavar="NAME=EVAL", help="of the first --data's heads")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args()
    path = args.output / "closed_form.json"
    args.output.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    towers = Towers(args.towers, args.output / "features", device="cpu")
    how = {"device": towers.device, "workers": 1}

    def half(folder: str) -> Half:
        return Half(LabelledFeatures(folder, towers, **how))

    features, halves = {}, {}
    for entry in args.data:
        name, _, places = entry.partition("=")
        pairs, _, labelled = places.partition(",")
        shards = sorted(map(str, Path(pairs).glob("*.tar")))
        fill([towers.images, towers.texts], shards, **how)
        kept = ShardPairs(towers.images.files, towers.texts.files, shards, device=towers.device)
        sides = zip(*((block.images, block.texts) for block in kept.blocks("Reading")), strict=True)
        features[name] = [torch.cat(side) for side in sides]
        halves[name] = {name: half(labelled)}
    if args.transfer:
        name, _, folder = args.transfer.partition("=")
        halves[next(iter(features))][name] = half(folder)
    todo = list(cells(list(features), args.seeds))
    for cell in tqdm(todo, unit="fit"):
        if json.dumps(cell) in results:
            continue
        model, _, statistics_ = fit(cell, *features[cell.data])
        wrong = statistics_.wrong
        for name, each in halves[cell.data].items():
            key = json.dumps(cell._replace(data=name))
            results[key] = each.metrics(model.heads_) | {
                "setting": list(statistics_.setting),
                "wrong": None if wrong is None else wrong.share,
            }
        write_json(path, results)
    for names in halves.values():
        for name in names:
            print("\n".join(["", *table(results, name)]))
    print("\n".join(["", *shares(results, list(features))]))


if __name__ == "__main__":
    main()
