"""What a second training takes from the first: heads on two frozen towers, one data set after the other.

The first model is trained with InfoNCE on ``--first``; from there each loss trains on pairs of
``--second``. Half of both test sets is measured, before and after, and for the average of the two
models' weights, by the training command without training data.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from torch import Tensor

from benchmarks import common
from benchmarks.efficiency_runs import Run, Source, Workplace, write_model

LOSSES = ("infonce", "otter")
SHARES = (0.5, 1.0)  # of the second model in the average
NAMES = ("first", "second")


def trained(place: Workplace, run: Run, start: Path | None = None) -> dict[str, Tensor]:
    """Weights after a run, which begins at the folder ``start`` or at drawn heads."""
    path = place.train(run, start) / "checkpoints" / "epoch_1.pt"
    return torch.load(path, weights_only=True)["state_dict"]


def averaged(
    first: dict[str, Tensor], second: dict[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Between two models, float weights only."""
    return {
        name: first[name].lerp(value, share) if value.is_floating_point() else value
        for name, value in second.items()
    }


def write(place: Workplace, state: dict[str, Tensor], name: str) -> Path:
    """A folder of the towers with these weights."""
    model = open_clip.create_model(f"local-dir:{place.towers}")
    model.load_state_dict(state)
    return write_model(place.towers, place.scratch / name, model.state_dict())


def measured(place: Workplace, model: Path) -> dict[str, float]:
    """mAP in percent of each test set."""
    found = {}
    for name in NAMES:
        words = ["--loss", "infonce", "--model", f"local-dir:{model}", "--workers", "0"]
        words += ["--zeroshot-data", str(place.sources[name].halves["test"])]
        found[name] = round(100 * place.measured(place.command(words), name, "test")["mAP"], 3)
    return found


def study(args: argparse.Namespace, place: Workplace) -> list[dict[str, Any]]:
    """A row for each seed's first model, and for each average with each second one."""
    rows = []
    for seed in range(args.seeds):
        start = Run("first", args.pairs[0], 0.0, seed, "infonce", 1e-3, 100, 2.0, 0.2, args.batch)
        first = trained(place, start)
        folder = write(place, first, "first")
        rows.append({"loss": "before", "steps": 0, "share": 0.0, **measured(place, folder)})
        for loss in LOSSES:
            for steps in args.steps:
                change = {"data": "second", "pairs": args.pairs[1], "loss": loss, "steps": steps}
                second = trained(place, start._replace(**change), folder)
                for share in SHARES:
                    average = write(place, averaged(first, second, share), "average")
                    settings = {"loss": loss, "steps": steps, "share": share}
                    rows.append(settings | measured(place, average))
    return rows


def report(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds: first and second data set."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["loss"], row["steps"], row["share"]].append(row)
    return [
        dict(zip(("loss", "steps", "share"), setting, strict=True))
        | {name: statistics.mean(row[name] for row in group) for name in NAMES}
        for setting, group in groups.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """Run all, print the means and write the result; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forgetting")
    add = parser.add_argument
    add("--towers", required=True, type=Path, help="that otter-openclip towers wrote")
    for name in NAMES:
        add(f"--{name}", required=True, metavar="TRAIN_DIR,EVAL_DIR")
    add("--pairs", type=int, nargs=2, default=[6000, 3000])
    add("--batch", type=int, default=512)
    add("--steps", type=int, nargs="+", default=[30, 100, 300])
    add("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    transformers.logging.disable_default_handler()
    with tempfile.TemporaryDirectory(prefix="forgetting-") as name:
        scratch = Path(name)
        sources = [Source(x, *getattr(args, x).split(","), scratch / "halves") for x in NAMES]
        rows = study(args, Workplace(sources, args.towers, scratch))
    print(common.table(report(rows)))
    settings = {name: getattr(args, name) for name in ("pairs", "batch", "steps", "seeds")}
    common.save("forgetting", {"machine": common.machine(), "settings": settings, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
