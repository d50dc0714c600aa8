r"""InfoNCE, LS, KD and OTTER on two frozen pretrained towers, over pairs, noise and seeds.

    otter-openclip towers TOWERS --image TIMM_NAME --image-weights FILE --text NAME_OR_DIR
    python -m benchmarks.data_efficiency --output OUT --towers TOWERS --glyphs \
        --data NAME=TRAIN_DIR,EVAL_DIR --data ...

Every loss is tuned over the same grid by mAP on half of the evaluation images, with a seed of its own,
for each data set with and without noise; all figures reported are of the other half. Losses have their
default settings: what else OTTER could be given is shown apart, as ablations, and not tuned.

Every result is one line of OUT/runs.jsonl, written at once: the same command goes on where the last one
stopped, and several may work at once on different --data of one OUT, all with the same --ablate.
``OUT/report`` has the tables, plots and figures of the --data given, so far.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from tqdm import tqdm

from benchmarks import common, efficiency_report
from benchmarks.efficiency_runs import Run, Source, Workplace
from otter_openclip.demo import dataset as glyphs

LOSSES = ("infonce", "ls", "kd", "otter")
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
SOFTMAX = ("--vv-coef", "1", "--tt-coef", "1", "--distill-T-t", str(round(1 / 0.15, 3)))
LARGE_BATCHES = (1024, 2048)
GLYPHS = 6000, 1000  # training pairs, test characters
PATHS = ("output", "data", "towers")  # of this machine: not in the report


class OutOfTime(Exception):
    """``--hours`` are over."""


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
        self.found: dict[str, list[tuple[Run, dict[str, Any]]]] = {}
        self.tuned: dict[tuple[str, float], dict[str, Run]] = {}
        self.checks: dict[str, Any] = {}
        self.started, self.bar = time.monotonic(), None

    def stages(self) -> list[tuple[str, Any, int]]:
        """Title, call and number of runs of each."""
        args, losses = self.args, len(LOSSES)
        grid = len(args.lrs) * len(args.steps) * len(args.scales)
        further = len(args.decays) - 1
        found = []
        for name in self.place.sources:
            found.append((f"{name}: encode and check", partial(self.check, name), 1))
            for noise in TUNED_NOISE:
                call = partial(self.tune, name, noise)
                found.append((f"{name}: tune, noise {noise:.0%}", call, losses * (grid + further)))
            count = len(self.sizes(name)) * len(args.noise) * args.seeds * losses
            found.append((f"{name}: pairs and noise", partial(self.final, name), count))
        first = args.ablate or next(iter(self.place.sources))
        if first not in self.place.sources:
            return found
        cells = len(list(self._cells()))
        count = cells * len(args.course) * losses
        found.append((f"{first}: steps", partial(self.course, first), count))
        count = cells * (3 + len(ABLATIONS) + 2 * len(self._large_batches(first)))
        found.append((f"{first}: ablations", partial(self.ablations, first), count))
        if args.train_image:
            count = losses * (len(args.image_lrs) + args.image_seeds)
            found.append((f"{first}: image tower too", partial(self.train_image, first), count))
        return found

    def run(self) -> list[tuple[str, int, int]]:
        """Do all that is missing; returns the stages that are left with runs done and runs in all."""
        stages = self.stages()
        with tqdm(total=sum(count for *_, count in stages), unit="run", smoothing=0.1) as self.bar:
            for i, (title, call, _) in enumerate(stages):
                self.bar.set_description(title)
                self.done = 0
                try:
                    call()
                except OutOfTime:
                    left = [(name, 0, count) for name, _, count in stages[i:]]
                    return [(title, self.done, left[0][2]), *left[1:]]
        return []

    def ensure(
        self, kind: str, runs: Iterable[Run], *extra: str, shown: bool = False
    ) -> list[tuple[Run, dict[str, Any]]]:
        """Each run with its result; those that are not there are run, as ``Workplace.do`` says."""
        pairs = []
        for run in runs:
            key = self.place.key(run) + (" checked" if extra else "")
            if key in self.results.found:
                self.bar.total -= 1  # only what is left counts for the time that is left
                self.bar.refresh()
            else:
                self._check_time()
                self.results.add(key, self.place.do(run, *extra, shown=shown))
                self.bar.update()
            self.done += 1
            pairs.append((run, self.results.found[key]))
            self.found.setdefault(kind, []).append(pairs[-1])
        return pairs

    def _check_time(self) -> None:
        if time.monotonic() - self.started > 3600 * self.args.hours:
            raise OutOfTime

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
        ((_, result),) = self.ensure("check", [run], *extra, shown=True)
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

    def tune(self, name: str, noise: float) -> None:
        """Each loss's best setting by mAP on the validation half: the grid, then the weight decay."""
        args = self.args
        self.tuned[name, noise] = {}
        base = Run(name, self.tuning_pairs(name), noise, TUNING_SEED, "", 0, 0, 0, 0, args.batch)
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
            found = self.ensure("tuning", runs[loss])
            chosen = best(found)
            further = [chosen._replace(decay=decay) for decay in args.decays[1:]]
            self.tuned[name, noise][loss] = best([*found, *self.ensure("tuning", further)])

    def chosen(self, name: str, noise: float, loss: str, **changes: Any) -> Run:
        """A run at the loss's tuned setting: that of the nearest noise, of two the larger."""
        nearest = min(TUNED_NOISE, key=lambda tuned: (round(abs(tuned - noise), 9), -tuned))
        return self.tuned[name, nearest][loss]._replace(noise=noise, **changes)

    def final(self, name: str) -> None:
        """The tuned losses over pairs, noise and seeds; the seed also draws pairs and heads."""
        product = itertools.product(
            range(self.args.seeds), self.args.noise, self.sizes(name), LOSSES
        )
        for seed, noise, pairs, loss in product:
            self.ensure("final", [self.chosen(name, noise, loss, seed=seed, pairs=pairs)])

    def _cells(self) -> itertools.product:
        return itertools.product(range(min(ABLATION_SEEDS, self.args.seeds)), TUNED_NOISE)

    def _large_batches(self, name: str) -> list[int]:
        return [batch for batch in LARGE_BATCHES if batch <= self.tuning_pairs(name)]

    def course(self, name: str) -> None:
        """The tuned losses with fewer and more steps."""
        for seed, noise in self._cells():
            for steps, loss in itertools.product(self.args.course, LOSSES):
                run = self.chosen(name, noise, loss, seed=seed, steps=steps)
                self.ensure("course", [run])

    def ablations(self, name: str) -> None:
        """OTTER's own settings, and larger batches, where the defaults were tuned."""
        for seed, noise in self._cells():
            otter = self.chosen(name, noise, "otter", seed=seed)
            plain = self.chosen(name, noise, "infonce", seed=seed)
            rows = {"InfoNCE": plain, "OTTER, defaults": otter}
            rows |= {f"OTTER, {title}": otter._replace(flags=f) for title, f in ABLATIONS.items()}
            rows["softmax of the same similarities, pair kept"] = otter._replace(
                loss="kd", flags=SOFTMAX
            )
            for batch in self._large_batches(name):
                rows[f"InfoNCE, batch {batch}"] = plain._replace(batch=batch)
                rows[f"OTTER, batch {batch}"] = otter._replace(batch=batch)
            for title, run in rows.items():
                self.ensure(f"ablation: {title}", [run])

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
        lrs = {loss: best(self.ensure("image tuning", runs[loss])).lr for loss in LOSSES}
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
        glyphs.write_test_set(split.unseen_characters, building / "eval", words=False)
        building.rename(folder)
    return Source("glyphs", folder / "train", folder / "eval")


def sources(args: argparse.Namespace, out: Path) -> list[Source]:
    """The data sets in the order they were given."""
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
    if len({source.name for source in found}) < len(found):
        raise ValueError("two --data of one name; the figures need different ones")
    for source in found:
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
    add("--ablate", metavar="NAME", help="data of steps and ablations; default: the first")
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
    efficiency_report.write(out / "report", study.found, study.tuned, study.checks, info)
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
