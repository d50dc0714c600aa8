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
stopped, and several may work at once on different --data of one OUT, all with the same --ablate.
``OUT/report`` has the tables, plots and figures of the --data given, so far.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import webdataset
from tqdm import tqdm

from benchmarks import common, efficiency_report
from benchmarks.efficiency_runs import IMAGES, Run, Source, Workplace, files_digest
from otter_openclip.compare import dataset as glyphs

LOSSES = ("infonce", "ls", "kd", "otter")
TITLES = efficiency_report.NAMES
TUNING_SEED = 100
TUNED_NOISE = (0.0, 0.4)
ABLATION_SEEDS = 3
# Of otter, each beside its defaults. Within 100 steps a decay above 0.92 is never reached.
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
MOST_PAIRS = (
    *("alpha 0.25", "alpha 0.75", "lambda 0.04", "lambda 0.3"),
    *("pair itself kept", "no image-image term", "no text-text term"),
)
LONGER = 3  # times the steps
SOFTMAX = ("--vv-coef", "1", "--tt-coef", "1", "--distill-T-t", str(round(1 / 0.15, 3)))
LARGE_BATCHES = (1024, 2048)
GLYPHS = 6000, 1000  # training pairs, test characters
PATHS = ("output", "data", "transfer", "towers")  # of this machine: not in the report


class OutOfTime(Exception):
    """``--hours`` are over before what a stage needs was there."""


class Results:
    """A result a line, by key; a line that a kill cut off is passed over."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, {}
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.found[row["key"]] = row["result"]

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Keep a result, at once: in one write, so that others may add theirs."""
        self.found[key] = result
        line = "\n" + json.dumps({"key": key, "result": result}) + "\n"  # the last may be torn
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())
            os.fsync(file.fileno())


class Study:
    """What is run, in which order; results by kind in ``found``."""

    def __init__(self, args: argparse.Namespace, place: Workplace, results: Results) -> None:
        self.args, self.place, self.results = args, place, results
        self.transfers = [text.partition("=")[0] for text in args.transfer]
        self.names = [name for name in place.sources if name not in self.transfers]
        self.first = args.ablate or self.names[0]
        self.found: dict[str, dict[Run, dict[str, Any]]] = {}
        self.tuned: dict[tuple[str, int, float], dict[str, Run]] = {}
        self.checks: dict[str, Any] = {}
        self.started, self.bar = time.monotonic(), None

    def stages(self) -> list[tuple[str, Any, int]]:
        """Title, call and number of runs of each."""
        args, first, losses, found = self.args, self.first, len(LOSSES), []
        grid = len(args.lrs) * len(args.steps) * len(args.scales)
        tuning = losses * (grid + len(args.decays) - 1)

        def add(title: str, count: int, call: Callable[..., None], *arguments: Any) -> None:
            found.append((title, partial(call, *arguments), count))

        for name in self.names:
            add(f"{name}: encode and check", 1, self.check, name)
            for noise in TUNED_NOISE:
                title = f"{name}: tune, noise {noise:.0%}"
                add(title, tuning, self.tune, name, self.tuning_pairs(name), noise)
            count = len(self.sizes(name)) * len(args.noise) * args.seeds * losses
            add(f"{name}: pairs and noise", count, self.final, name)
        if first not in self.names:
            return found
        cells = len(list(self._cells()))
        add(f"{first}: steps", cells * len(args.course) * losses, self.course, first)
        count = cells * self._row_count(self.tuning_pairs(first), ABLATIONS) + cells
        add(f"{first}: ablations", count, self.ablations, first)
        for name in self.transfers:
            count = cells * len(self.sizes(name)) * losses
            add(f"{name}: encode and check", 1, self.check, name)
            add(f"{name}: as tuned on {first}", count, self.transfer, name)
        for name in self.place.sources:
            seeds, most = cells // len(TUNED_NOISE), max(self.sizes(name))
            longer = losses + 2 * (LARGE_BATCHES[-1] <= most)
            count = seeds * (longer + self._row_count(most, MOST_PAIRS))
            add(f"{name}: {most:,} pairs", count, self.most_pairs, name)
        for name in self.place.sources:
            title = f"{name}: tuned at {max(self.sizes(name)):,} pairs"
            add(title, tuning + args.seeds * losses, self.tuned_at_most, name)
        if args.train_image:
            count = losses * (len(args.image_lrs) + args.image_seeds)
            add(f"{first}: image tower too", count, self.train_image, first)
        return found

    def run(self) -> list[tuple[str, int, int]]:
        """Do all that is missing; returns the stages that are left with runs done and runs in all."""
        stages, left = self.stages(), []
        with tqdm(total=sum(count for *_, count in stages), unit="run", smoothing=0.1) as self.bar:
            for title, call, count in stages:
                self.bar.set_description(title)
                self.done = 0
                with contextlib.suppress(OutOfTime):  # later stages may have been done
                    call()
                if self.done < count:
                    left.append((title, self.done, count))
        return left

    def ensure(
        self, kind: str, runs: Iterable[Run], *extra: str, shown: bool = False
    ) -> list[tuple[Run, dict[str, Any]]]:
        """Each run with its result; those that are not there are run, as ``Workplace.do`` says.

        When ``--hours`` are over they are left out.
        """
        pairs = []
        for run in runs:
            key = self.place.key(run) + (" checked" if extra else "")
            if key in self.results.found:
                self.bar.total -= 1  # only what is left counts for the time that is left
                self.bar.refresh()
            elif time.monotonic() - self.started > 3600 * self.args.hours:
                continue
            else:
                self.results.add(key, self.place.do(run, *extra, shown=shown))
                self.bar.update()
            self.done += 1
            pairs.append((run, self.results.found[key]))
            self.found.setdefault(kind, {})[run] = self.results.found[key]
        return pairs

    def all_of(
        self, kind: str, runs: Sequence[Run], *extra: str, shown: bool = False
    ) -> list[tuple[Run, dict[str, Any]]]:
        """As ``ensure``, for what needs every one of them; OutOfTime if some are left out."""
        found = self.ensure(kind, runs, *extra, shown=shown)
        if len(found) < len(runs):
            raise OutOfTime
        return found

    def sizes(self, name: str) -> list[int]:
        """Numbers of pairs to draw of a data set: no more than it has."""
        return sorted(
            {min(pairs, len(self.place.sources[name].samples)) for pairs in self.args.pairs}
        )

    def tuning_pairs(self, name: str) -> int:
        """Number of pairs that settings are chosen with."""
        return min(self.args.tuning_pairs, len(self.place.sources[name].samples))

    def check(self, name: str) -> None:
        """Encode all pairs in a short run, and compare its metrics with ``--zeroshot-data``'s."""
        source = self.place.sources[name]
        size = len(source.samples)
        run = Run(name, size, 0.0, 0, "otter", 1e-3, 2, 3.9, 0.2, min(64, size))
        extra = ("--zeroshot-data", str(source.labelled))
        ((_, result),) = self.all_of("check", [run], *extra, shown=True)
        ours, theirs = result["student"]["all"], result["command"]
        pairs = {k: (v, theirs[f"zeroshot-{k}"]) for k, v in ours.items() if k != "mAP"}
        off = max(abs(one - other) for one, other in pairs.values())
        self.checks[name] = {
            "ours, --zeroshot-data": pairs,
            "largest difference": off,
            "seconds, encoding included": result["train_seconds"],
        }
        if off > 2e-3:
            raise RuntimeError(f"{name}: the command's own evaluation gives other figures: {pairs}")

    def tune(self, name: str, pairs: int, noise: float) -> None:
        """Each loss's best setting by mAP on the validation half: the grid, then the weight decay."""
        args, tuned = self.args, self.tuned.setdefault((name, pairs, noise), {})
        base = Run(name, pairs, noise, TUNING_SEED, "", 0, 0, 0, 0, args.batch)
        first = args.decays[0]
        grid = list(itertools.product(args.scales, args.lrs, args.steps))
        runs = {
            loss: [
                base._replace(loss=loss, scale=scale, lr=lr, steps=steps, decay=first)
                for scale, lr, steps in grid
            ]
            for loss in LOSSES
        }
        for loss in LOSSES:
            found = self.all_of("tuning", runs[loss])
            chosen = best(found)
            further = [chosen._replace(decay=decay) for decay in args.decays[1:]]
            tuned[loss] = best([*found, *self.all_of("tuning", further)])

    def chosen(
        self, name: str, noise: float, loss: str, *, at: int | None = None, **changes: Any
    ) -> Run:
        """A run at the loss's tuned setting: that of the nearest noise, of two the larger.

        Tuned at ``at`` pairs, by default ``--tuning-pairs``.
        """
        at = self.tuning_pairs(name) if at is None else at
        nearest = min(TUNED_NOISE, key=lambda tuned: (round(abs(tuned - noise), 9), -tuned))
        if (tuned := self.tuned.get((name, at, nearest), {}).get(loss)) is None:
            raise OutOfTime
        return tuned._replace(noise=noise, **changes)

    def final(self, name: str) -> None:
        """The tuned losses over pairs, noise and seeds; the seed also draws pairs and heads."""
        product = itertools.product(
            range(self.args.seeds), self.args.noise, self.sizes(name), LOSSES
        )
        for seed, noise, pairs, loss in product:
            self.ensure("final", [self.chosen(name, noise, loss, seed=seed, pairs=pairs)])

    def _cells(self) -> itertools.product:
        return itertools.product(range(min(ABLATION_SEEDS, self.args.seeds)), TUNED_NOISE)

    def course(self, name: str) -> None:
        """The tuned losses with fewer and more steps."""
        for seed, noise in self._cells():
            for steps, loss in itertools.product(self.args.course, LOSSES):
                run = self.chosen(name, noise, loss, seed=seed, steps=steps)
                self.ensure("course", [run])

    def _rows(
        self, name: str, seed: int, noise: float, pairs: int, titles: Iterable[str]
    ) -> dict[str, Run]:
        """The tuned losses, OTTER with the ``ABLATIONS`` of these titles, and larger batches."""
        of = self.first if name in self.transfers else name
        change = {"seed": seed, "pairs": pairs, "data": name}
        tuned = {loss: self.chosen(of, noise, loss, **change) for loss in LOSSES}
        rows = {TITLES[loss]: run for loss, run in tuned.items()}
        for title in titles:
            rows[f"OTTER, {title}"] = tuned["otter"]._replace(flags=ABLATIONS[title])
        for batch, loss in itertools.product(LARGE_BATCHES, ("infonce", "otter")):
            if batch <= pairs:
                rows[f"{TITLES[loss]}, batch {batch}"] = tuned[loss]._replace(batch=batch)
        return rows

    def _row_count(self, pairs: int, titles: Sequence[str]) -> int:
        return len(LOSSES) + len(titles) + 2 * sum(batch <= pairs for batch in LARGE_BATCHES)

    def ablations(self, name: str) -> None:
        """OTTER's own settings, and larger batches, where the defaults were tuned."""
        for seed, noise in self._cells():
            rows = self._rows(name, seed, noise, self.tuning_pairs(name), ABLATIONS)
            rows["softmax of the same similarities, pair kept"] = rows["OTTER"]._replace(
                loss="kd", flags=SOFTMAX
            )
            self._ablate(rows)

    def most_pairs(self, name: str) -> None:
        """The same at the most pairs, without noise, and all losses and the largest batch for longer."""
        for seed in range(min(ABLATION_SEEDS, self.args.seeds)):
            rows = self._rows(name, seed, TUNED_NOISE[0], max(self.sizes(name)), MOST_PAIRS)
            largest = f", batch {LARGE_BATCHES[-1]}"
            longer = [
                title for title in rows if title in TITLES.values() or title.endswith(largest)
            ]
            for title in longer:
                steps = LONGER * rows[title].steps
                rows[f"{title}, {LONGER} times the steps"] = rows[title]._replace(steps=steps)
            self._ablate(rows)

    def _ablate(self, rows: dict[str, Run]) -> None:
        for title, run in rows.items():
            self.ensure(f"ablation: {title}", [run])

    def transfer(self, name: str) -> None:
        """Models of the first data, as tuned there, judged on other photos."""
        for (seed, noise), pairs in itertools.product(self._cells(), self.sizes(name)):
            change = {"seed": seed, "pairs": pairs, "data": name}
            runs = [self.chosen(self.first, noise, loss, **change) for loss in LOSSES]
            self.ensure(f"page: {name}, tuned on {self.first}", runs)

    def tuned_at_most(self, name: str) -> None:
        """The losses tuned at the most pairs, without noise."""
        most, noise = max(self.sizes(name)), TUNED_NOISE[0]
        self.tune(name, most, noise)
        for seed, loss in itertools.product(range(self.args.seeds), LOSSES):
            run = self.chosen(name, noise, loss, at=most, seed=seed)
            self.ensure(f"page: {name}, tuned at {most:,} pairs", [run])

    def train_image(self, name: str) -> None:
        """The image tower trained as well, live and clean: its own learning rate, the rest as tuned."""
        args = self.args
        image = {"train_image": args.image_size_trained, "batch": args.image_batch}
        image |= {"steps": args.image_steps}
        noise = TUNED_NOISE[0]
        runs = {
            loss: [self.chosen(name, noise, loss, lr=lr, **image) for lr in args.image_lrs]
            for loss in LOSSES
        }
        lrs = {loss: best(self.all_of("image tuning", runs[loss])).lr for loss in LOSSES}
        for seed, loss in itertools.product(range(args.image_seeds), LOSSES):
            run = self.chosen(name, noise, loss, seed=seed, lr=lrs[loss], **image)
            self.ensure("image", [run])


def best(found: Sequence[tuple[Run, dict[str, Any]]]) -> Run:
    """The run with the highest mAP on the validation half, of equal ones the first."""
    return max(found, key=lambda pair: pair[1]["student"]["val"]["mAP"])[0]


def glyph_source(folder: Path) -> Source:
    """The demo's glyphs: half-named pairs, and full names of characters never seen in training."""
    if not folder.is_dir():
        building = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(building, ignore_errors=True)
        rng = random.Random(0)
        pairs, test = GLYPHS
        split = glyphs.split_glyphs(rng, train=pairs, test=test)
        glyphs.write_training_shards(split.train, building / "train", rng)
        glyphs.write_test_set(split.unseen_characters, building / "eval")
        building.rename(folder)
    return Source("glyphs", folder / "train", folder / "eval")


def as_multilabel(folder: Path, out: Path) -> Path:
    """The evaluation set ``folder``; of one with a class a picture, a copy in ``out`` with vectors."""
    kind = folder / "dataset_type.txt"
    if kind.is_file() and kind.read_text().strip().lower() != "classification":
        return folder
    copy = out / "multilabel" / files_digest(sorted(folder.rglob("*")))
    if copy.is_dir():
        return copy
    building = copy.with_name(f"{copy.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    (building / "test").mkdir(parents=True)
    vectors = np.eye(len((folder / "classnames.txt").read_text().splitlines()), dtype=np.uint8)
    for shard in range(int((folder / "test" / "nshards.txt").read_text())):
        samples = []
        path = folder / "test" / f"{shard}.tar"
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            image = next((kind for kind in IMAGES if kind in sample), None)
            label = int(sample.get("cls", -1))
            if image is None or not 0 <= label < len(vectors):
                raise ValueError(
                    f"{path}: sample {sample['__key__']} needs an image and a .cls from 0 to "
                    f"{len(vectors) - 1}, the lines of classnames.txt; build the shard again"
                )
            samples.append({image: sample[image], "npy": glyphs.npy(vectors[label])})
        glyphs.write_tar(building / "test" / path.name, samples)
    for path in [*folder.glob("*.txt"), folder / "test" / "nshards.txt"]:
        shutil.copy(path, building / path.relative_to(folder))
    (building / "dataset_type.txt").write_text("multilabel")
    building.rename(copy)
    return copy


def sources(args: argparse.Namespace, out: Path) -> list[Source]:
    """The data sets in the order they were given, then the transfers of the first."""
    found = []
    for text in args.data:
        name, _, folders = text.partition("=")
        if len(parts := folders.split(",")) != 2:
            raise ValueError(f"--data {text} must be NAME=TRAIN_DIR,EVAL_DIR")
        found.append(Source(name, *parts))
    if args.glyphs:
        found.append(glyph_source(out / "glyphs"))
    if not found:
        raise ValueError("no data: give --data NAME=TRAIN_DIR,EVAL_DIR, --glyphs or both")
    first = next((x for x in found if x.name == (args.ablate or found[0].name)), None)
    for text in args.transfer:
        name, equals, folder = text.partition("=")
        if not equals or first is None:
            raise ValueError(
                f"--transfer {text} must be NAME=EVAL_DIR, and the data of --ablate be given"
            )
        found.append(Source(name, first.pairs, folder))
    if len({source.name for source in found}) < len(found):
        raise ValueError("two --data of one name; the figures need different ones")
    for source in found:
        source.labelled = as_multilabel(source.labelled, out)
        if args.batch > (pairs := min(*args.pairs, args.tuning_pairs, len(source.samples))):
            raise ValueError(f"--batch {args.batch} is more than {pairs} pairs of {source.name}")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_efficiency")
    add = parser.add_argument
    add("--output", required=True, metavar="OUT", help="results, features and the report")
    add("--towers", required=True, metavar="DIR", help="that otter-openclip towers wrote")
    add("--data", action="append", default=[], metavar="NAME=TRAIN_DIR,EVAL_DIR")
    add("--glyphs", action="store_true", help="also the demo's glyphs, made into OUT")
    add(
        "--transfer",
        action="append",
        default=[],
        metavar="NAME=EVAL_DIR",
        help="judge models of the data of --ablate on these photos too",
    )
    add("--pairs", type=int, nargs="+", default=[1500, 3000, 6000])
    add("--noise", type=float, nargs="+", default=[0.0, 0.2, 0.4], help="captions shuffled")
    add("--seeds", type=int, default=5)
    add("--batch", type=int, default=512)
    add("--tuning-pairs", type=int, default=3000)
    add("--lrs", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    add("--steps", type=int, nargs="+", default=[30, 100, 300])
    add("--scales", type=float, nargs="+", default=[2.0, 3.9], help="logs, of both at the start")
    add("--decays", type=float, nargs="+", default=[0.2, 1.0, 5.0], help="the first in the grid")
    add("--course", type=int, nargs="+", default=[10, 30, 100, 300, 1000], help="steps of its plot")
    add(
        "--ablate", metavar="NAME", help="data of steps, ablations and transfer; default: the first"
    )
    add("--train-image", action="store_true", help="also train the image tower, live")
    add("--image-size-trained", type=int, default=112)
    add("--image-batch", type=int, default=128)
    add("--image-steps", type=int, default=40)
    add("--image-lrs", type=float, nargs="+", default=[3e-4, 1e-3])
    add("--image-seeds", type=int, default=2)
    add("--hours", type=float, default=float("inf"), help="start no run after so many")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and write the report; returns the exit code."""
    args = parse(argv)
    transformers.logging.disable_default_handler()  # it prints a configuration in every run
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    if not (Path(args.towers) / "open_clip_config.json").is_file():
        raise ValueError(f"--towers {args.towers} is not a folder that otter-openclip towers wrote")
    data = sources(args, out)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="data-efficiency-", dir=memory) as scratch:
        place = Workplace(data, Path(args.towers), out, Path(scratch))
        study = Study(args, place, Results(out / "runs.jsonl"))
        left = study.run()
    settings = {name: value for name, value in vars(args).items() if name not in PATHS}
    info = {"machine": common.machine(), "settings": settings, "missing": left}
    found = {kind: list(results.items()) for kind, results in study.found.items()}
    efficiency_report.write(out / "report", found, study.tuned, study.checks, info)
    print(f"{len(study.results.found)} results in {study.results.path}; {out / 'report'}")
    for title, done, count in left:
        print(f"missing: {title}: {count - done} of {count} runs")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave no scratch in memory
    try:
        raise SystemExit(main())
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
