r"""InfoNCE, LS, KD and OTTER on two frozen pretrained towers, over pairs, noise and seeds.

    otter-openclip towers TOWERS --image TIMM_NAME --image-weights FILE --text NAME_OR_DIR
    python -m benchmarks.data_efficiency --output OUT --towers TOWERS --glyphs \
        --data NAME=TRAIN_DIR,EVAL_DIR --data ... --transfer NAME=EVAL_DIR

Every loss is tuned over the same grid by mAP on half of the evaluation images, with a seed of its own,
for each data set with and without noise; all figures reported are of the other half. Losses have their
default settings: what else OTTER could be given is shown apart, as ablations, and not tuned.
--transfer judges models of the first data on photos of other classes. Settings are chosen at
--tuning-pairs, and once more at the most pairs without noise (for a transfer, by its own photos).

Every result is one line of OUT/runs.jsonl, written at once: the same command goes on where the last one
stopped, as long as the data are the same. OUT/data_efficiency.json has the figures of what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import transformers
from tqdm import tqdm

from benchmarks import common
from benchmarks.efficiency_runs import Run, Source, Workplace
from otter_openclip.compare import dataset as glyphs
from otter_openclip.compare.report import LABELS
from otter_openclip.files import write_json

LOSSES = ("infonce", "ls", "kd", "otter")
METRICS = {"mAP": "mAP"} | {f"F@{k}": f"flat_hit@{k}" for k in (1, 2, 5, 10)}
TUNING_SEED = 100
CLEAN = 0.0
TUNED_NOISE = (CLEAN, 0.4)
ABLATION_SEEDS = 3
# Of OTTER, each beside its defaults. Within 100 steps a decay above 0.92 is never reached.
ABLATIONS = {
    **{f"lambda {x}": ("--sinkhorn-lambda", x) for x in ("0.02", "0.04", "0.08", "0.3")},
    **{f"alpha {x}": ("--alpha", x) for x in ("0.25", "0.75")},
    **{f"EMA decay {x}": ("--ema-decay", x) for x in ("0", "0.7")},
    "pair itself kept": ("--keep-diag",),
    "1 iteration": ("--sinkhorn-iter", "1"),
    "20 iterations": ("--sinkhorn-iter", "20"),
    "no image-image term": ("--vv-coef", "0"),
    "no text-text term": ("--tt-coef", "0"),
}
# At the most pairs, without noise: what OTTER costs there, and what could change it.
MOST_PAIRS = ("alpha 0.25", "alpha 0.75", "lambda 0.04", "lambda 0.3", "pair itself kept")
MOST_PAIRS += ("no image-image term", "no text-text term")
LONGER = 3  # times the steps
SOFTMAX = ("--vv-coef", "1", "--tt-coef", "1", "--distill-T-t", str(round(1 / 0.15, 3)))
LARGE_BATCHES = (1024, 2048)
GLYPHS = 6000, 1000  # training pairs, test characters
IMAGE_LRS, IMAGE_SEEDS = (3e-4, 1e-3), 2
IMAGE = {"train_image": 112, "batch": 128, "steps": 40}  # of --train-image
PATHS = ("output", "data", "transfer", "towers")  # of this machine: not in the results

Results = dict[Run, dict[str, float]]


class Study:
    """What is run, in which order; results by kind in ``found``."""

    def __init__(self, args: argparse.Namespace, place: Workplace, path: Path) -> None:
        self.args, self.place, self.path = args, place, path
        self.transfers = [text.partition("=")[0] for text in args.transfer]
        self.names = [name for name in place.sources if name not in self.transfers]
        self.found: dict[str, Results] = defaultdict(dict)
        self.tuned: dict[tuple[str, int, float], dict[str, Run]] = {}
        self.bar = tqdm(unit="run")
        self.results: dict[str, dict[str, float]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            if line.endswith("}}"):  # a kill may have torn a line; that run is made again
                row = json.loads(line)
                self.results[row["key"]] = row["result"]

    def run(self) -> None:
        """Do all that is missing."""
        args, first, seeds = self.args, self.names[0], range(self.args.seeds)
        for name in self.names:
            for noise in TUNED_NOISE:
                self.tune(name, self.tuning_pairs(name), noise)
            for seed, noise, pairs, loss in product(seeds, args.noise, self.sizes(name), LOSSES):
                run = self.chosen(name, noise, loss, seed=seed, pairs=pairs)
                self.ensure(name, [run])
        cells = list(product(seeds[:ABLATION_SEEDS], TUNED_NOISE))
        for (seed, noise), steps, loss in product(cells, args.course, LOSSES):
            self.ensure("steps", [self.chosen(first, noise, loss, seed=seed, steps=steps)])
        for seed, noise in cells:
            pairs = self.tuning_pairs(first)
            rows = self.variants(first, seed, noise, pairs, ABLATIONS)
            softmax = rows["OTTER"]._replace(loss="kd", flags=SOFTMAX)
            self.ensure_all(rows | {"softmax of the same similarities, pair kept": softmax})
        for name in self.transfers:
            for (seed, noise), pairs, loss in product(cells, self.sizes(name), LOSSES):
                run = self.chosen(first, noise, loss, seed=seed, pairs=pairs, data=name)
                self.ensure(f"{name}, tuned on {first}", [run])
        for name in self.place.sources:
            most = max(self.sizes(name))
            for seed in seeds[:ABLATION_SEEDS]:
                rows = self.variants(name, seed, CLEAN, most, MOST_PAIRS)
                for title in [*LABELS.values(), *(t for t in rows if t.endswith(" batch 2048"))]:
                    longer = rows[title]._replace(steps=LONGER * rows[title].steps)
                    rows[f"{title}, {LONGER} times the steps"] = longer
                self.ensure_all(rows)
            self.tune(name, most, CLEAN)
            for seed, loss in product(seeds, LOSSES):
                run = self.chosen(name, CLEAN, loss, at=most, seed=seed)
                self.ensure(f"{name}, tuned at {most:,} pairs", [run])
        for loss in LOSSES if args.train_image else ():
            tuned = self.chosen(first, CLEAN, loss, **IMAGE)
            best = self.best("image tuning", [tuned._replace(lr=lr) for lr in IMAGE_LRS])
            self.ensure("image tower", [best._replace(seed=seed) for seed in range(IMAGE_SEEDS)])

    def ensure(self, kind: str, runs: Iterable[Run]) -> list[Run]:
        """Run those that have no result yet; gives all."""
        runs = list(runs)
        for run in runs:
            key = self.place.key(run)
            if key not in self.results:
                self.bar.set_description(f"{run.data}, {kind}")
                self.results[key] = self.place.do(run)
                line = "\n" + json.dumps({"key": key, "result": self.results[key]}) + "\n"
                with self.path.open("ab", buffering=0) as file:
                    file.write(line.encode())
                    os.fsync(file.fileno())
                self.bar.update()
            self.found[kind][run] = self.results[key]
        return runs

    def ensure_all(self, rows: dict[str, Run]) -> None:
        """As ``ensure``, each under its title."""
        for title, run in rows.items():
            self.ensure(f"ablation: {title}", [run])

    def best(self, kind: str, runs: Iterable[Run]) -> Run:
        """The run with the highest mAP on the validation half, of equal ones the first."""
        runs = self.ensure(kind, [run._replace(half="validation") for run in runs])
        return max(runs, key=lambda run: self.found[kind][run]["mAP"])._replace(half="test")

    def sizes(self, name: str) -> list[int]:
        """Numbers of pairs to draw of a data set: no more than it has."""
        most = len(self.place.sources[name].pairs)
        return sorted({min(pairs, most) for pairs in self.args.pairs})

    def tuning_pairs(self, name: str) -> int:
        """Number of pairs that settings are chosen with."""
        return min(self.args.tuning_pairs, len(self.place.sources[name].pairs))

    def tune(self, name: str, pairs: int, noise: float) -> None:
        """Each loss's best setting: the grid, then the weight decay."""
        args, tuned = self.args, self.tuned.setdefault((name, pairs, noise), {})
        base = Run(name, pairs, noise, TUNING_SEED, "", 0, 0, 0, args.decays[0], args.batch)
        grid = list(product(args.scales, args.lrs, args.steps))
        for loss in LOSSES:
            runs = [base._replace(loss=loss, scale=s, lr=lr, steps=steps) for s, lr, steps in grid]
            best = self.best("tuning", runs)
            tuned[loss] = self.best("tuning", [best._replace(decay=x) for x in args.decays])

    def chosen(
        self, name: str, noise: float, loss: str, *, at: int | None = None, **changes: Any
    ) -> Run:
        """A run at the loss's tuned setting: that of the nearest noise, of two the larger.

        Tuned at ``at`` pairs, by default ``--tuning-pairs``.
        """
        at = self.tuning_pairs(name) if at is None else at
        nearest = min(TUNED_NOISE, key=lambda tuned: (round(abs(tuned - noise), 9), -tuned))
        return self.tuned[name, at, nearest][loss]._replace(noise=noise, **changes)

    def variants(
        self, name: str, seed: int, noise: float, pairs: int, titles: Iterable[str]
    ) -> dict[str, Run]:
        """The tuned losses, OTTER with the ``ABLATIONS`` of these titles, and larger batches."""
        tuned_on = self.names[0] if name in self.transfers else name
        change = {"seed": seed, "pairs": pairs, "data": name}
        tuned = {loss: self.chosen(tuned_on, noise, loss, **change) for loss in LOSSES}
        rows = {LABELS[loss]: run for loss, run in tuned.items()}
        for title in titles:
            rows[f"OTTER, {title}"] = tuned["otter"]._replace(flags=ABLATIONS[title])
        for batch, loss in product(LARGE_BATCHES, ("infonce", "otter")):
            if batch <= pairs:
                rows[f"{LABELS[loss]}, batch {batch}"] = tuned[loss]._replace(batch=batch)
        return rows


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the sample's standard deviation, 0 of one value; to a thousandth."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return round(statistics.fmean(values), 3), round(deviation, 3)


def rows(results: Results, base: Results) -> list[dict[str, Any]]:
    """A row for each setting, over its seeds: percents as (mean, deviation).

    ``gain`` is the mAP less that of ``base``'s InfoNCE on the same pairs, seed by seed; ``ahead`` the
    seeds on which it is higher.
    """
    cells: dict[Run, list[Run]] = defaultdict(list)
    for run in results:
        cells[run._replace(seed=-1)].append(run)
    infonce = {run[:4]: result["mAP"] for run, result in base.items() if run.loss == "infonce"}
    table = []
    for setting, runs in cells.items():
        row = setting._asdict() | {"seed": None, "seeds": len(runs)}
        for name, metric in METRICS.items():
            row[name] = mean_std([100 * results[run][metric] for run in runs])
        gains = [100 * (results[r]["mAP"] - infonce[r[:4]]) for r in runs if r[:4] in infonce]
        if gains:
            row |= {"gain": mean_std(gains), "ahead": sum(gain > 0 for gain in gains)}
        table.append(row)
    return table


def report(found: dict[str, Results]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each kind; an ablation's gain is over InfoNCE as tuned on the same pairs."""
    tuned = found.get(f"ablation: {LABELS['infonce']}", {})
    return {
        kind: rows(results, tuned if kind.startswith("ablation") else results)
        for kind, results in found.items()
        if not kind.endswith("tuning")
    }


def write_glyphs(folder: Path) -> str:
    """The demo's glyphs, half-named pairs and full names of unseen characters, as --data."""
    shutil.rmtree(folder, ignore_errors=True)
    rng = random.Random(0)
    pairs, test = GLYPHS
    split = glyphs.split_glyphs(rng, train=pairs, test=test)
    glyphs.write_training_shards(split.train, folder / "train", rng)
    glyphs.write_test_set(split.unseen_characters, folder / "eval")
    return f"glyphs={folder / 'train'},{folder / 'eval'}"


def main(argv: list[str] | None = None) -> int:
    """Run what is missing and write the figures, also when interrupted; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_efficiency")
    add = parser.add_argument
    add("--output", required=True, metavar="OUT", help="results, and the halves")
    add("--towers", required=True, type=Path, metavar="DIR", help="of otter-openclip towers")
    add("--data", action="append", default=[], metavar="NAME=TRAIN_DIR,EVAL_DIR")
    add("--glyphs", action="store_true", help="also the demo's glyphs, made into OUT")
    text = "judge models of the first data on these photos too"
    add("--transfer", action="append", default=[], metavar="NAME=EVAL_DIR", help=text)
    add("--pairs", type=int, nargs="+", default=[1500, 3000, 6000])
    add("--noise", type=float, nargs="+", default=[0.0, 0.2, 0.4], help="captions shuffled")
    add("--seeds", type=int, default=5)
    add("--batch", type=int, default=512)
    add("--tuning-pairs", type=int, default=3000)
    add("--lrs", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    add("--steps", type=int, nargs="+", default=[30, 100, 300])
    add("--scales", type=float, nargs="+", default=[2.0, 3.9], help="logs, of both at the start")
    add("--decays", type=float, nargs="+", default=[0.2, 1.0, 5.0], help="the first in the grid")
    add("--course", type=int, nargs="+", default=[10, 30, 100, 300, 1000], help="steps to compare")
    add("--train-image", action="store_true", help="also train the image tower, live")
    args = parser.parse_args(argv)
    transformers.logging.disable_default_handler()  # it prints a configuration in every run
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    data = [*args.data, *([write_glyphs(out / "glyphs")] if args.glyphs else [])]
    places = [text.replace("=", ",").split(",") for text in data]
    for text in args.transfer:
        name, folder = text.split("=")
        places.append([name, places[0][1], folder])
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="data-efficiency-", dir=memory) as scratch:
        sources = [Source(*place, out / "halves") for place in places]
        study = Study(args, Workplace(sources, args.towers, Path(scratch)), out / "runs.jsonl")
        try:
            study.run()
        finally:
            settings = {name: value for name, value in vars(args).items() if name not in PATHS}
            tuned = [run._asdict() for chosen in study.tuned.values() for run in chosen.values()]
            found = {"machine": common.machine(), "settings": settings, "tuned": tuned}
            write_json(out / "data_efficiency.json", found | report(study.found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
