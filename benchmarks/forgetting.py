"""What a second training takes from the first: heads on two frozen towers, one data set after the other.

The first model is trained with InfoNCE on ``--first``; from there each loss trains on pairs of
``--second``. Both test sets are measured, half of each, before and after, and for the average of the two
models' weights. Runs are those of ``data_efficiency``, whose ``--output`` may be given to use what its
towers gave.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import common
from benchmarks.efficiency_runs import Run, Source, Workplace, quietly
from otter_openclip import train

State = dict[str, Tensor]
LOSSES = ("infonce", "otter")
SHARES = (0.5, 1.0)  # of the second model in the average


def trained(place: Workplace, run: Run, start: Path | None = None) -> State:
    """Weights after a run, which begins at the folder ``start`` or at drawn heads."""
    pairs, drawn = place._folders(run)
    logs = place.scratch / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    with quietly():
        train.main(place.command(run, pairs, start or drawn))
    return torch.load(logs / "run" / "checkpoints" / "epoch_1.pt", weights_only=True)["state_dict"]


def write_model(towers: Path, state: State, out: Path) -> Path:
    """The folder ``towers`` with other weights."""
    model = open_clip.create_model(f"local-dir:{towers}")
    model.load_state_dict(state)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    found = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(found, out / "open_clip_model.safetensors", metadata={"format": "pt"})
    for path in towers.glob("*.json"):
        shutil.copy(path, out)
    return out


def averaged(first: State, second: State, share: float) -> State:
    """Between two models, float weights only."""
    return {
        name: first[name].lerp(value, share) if value.is_floating_point() else value
        for name, value in second.items()
    }


def measured(place: Workplace, state: State, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """mAP in percent of both halves of each test set."""
    rows = {name: place.judge(name).measure(state) for name in names}
    return {
        name: {half: round(100 * found[half]["mAP"], 3) for half in ("val", "test")}
        for name, found in rows.items()
    }


def study(args: argparse.Namespace, place: Workplace) -> list[dict[str, Any]]:
    """A row for each seed's first model, and for each average with each second one."""
    names, rows = ("first", "second"), []
    for seed in range(args.seeds):
        start = Run("first", args.pairs[0], 0.0, seed, "infonce", 1e-3, 100, 2.0, 0.2, 512)
        first = trained(place, start)
        folder = write_model(place.towers, first, place.scratch / "first")
        rows.append({"seed": seed, "loss": "before", **measured(place, first, names)})
        print(rows[-1], flush=True)
        for loss in LOSSES:
            for lr in args.lrs:
                for steps in args.steps:
                    run = Run("second", args.pairs[1], 0.0, seed, loss, lr, steps, 2.0, 0.2, 512)
                    second = trained(place, run, folder)
                    settings = {"seed": seed, "loss": loss, "lr": lr, "steps": steps}
                    for share in SHARES:
                        found = measured(place, averaged(first, second, share), names)
                        rows.append({**settings, "share": share, **found})
                        print(rows[-1], flush=True)
    return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds of the test halves: first and second data set."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row.get(name, "") for name in ("loss", "lr", "steps", "share"))
        groups.setdefault(key, []).append(row)
    lines = [f"{'loss':8} {'lr':>6} {'steps':>5} {'share':>5} {'first':>6} {'second':>6} seeds"]
    for (loss, lr, steps, share), found in groups.items():
        maps = [statistics.mean(r[name]["test"] for r in found) for name in ("first", "second")]
        cells = f"{loss:8} {lr!s:>6} {steps!s:>5} {share!s:>5} {maps[0]:6.1f} {maps[1]:6.1f}"
        lines.append(f"{cells} {len(found)}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all and write the result; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forgetting")
    add = parser.add_argument
    add("--towers", required=True, type=Path, help="that otter-openclip towers wrote")
    add("--kept", required=True, type=Path, help="what the towers give is kept here")
    for name in ("first", "second"):
        add(f"--{name}", required=True, metavar="TRAIN_DIR,EVAL_DIR")
    add("--pairs", type=int, nargs=2, default=[6000, 3000])
    add("--lrs", type=float, nargs="+", default=[1e-3])
    add("--steps", type=int, nargs="+", default=[30, 100, 300])
    add("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    transformers.logging.disable_default_handler()
    data = [Source(name, *getattr(args, name).split(",")) for name in ("first", "second")]
    with tempfile.TemporaryDirectory(prefix="forgetting-") as scratch:
        rows = study(args, Workplace(data, args.towers, args.kept, Path(scratch)))
    print(report(rows))
    settings = {name: getattr(args, name) for name in ("pairs", "lrs", "steps", "seeds")}
    result = {"machine": common.machine(), "settings": settings, "rows": rows}
    common.save("forgetting", result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
