"""The demo's run: data, towers, training, evaluation in its course, export, report."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset
from open_clip_train.data import filter_no_caption_or_no_image, log_and_continue
from tqdm import tqdm

from otter_openclip import OtterLoss
from otter_openclip.checkpoints.contents import TEACHER
from otter_openclip.compare.course import TestSet, Towers, pair_features
from otter_openclip.compare.dataset import Data, make_glyphs
from otter_openclip.compare.own import find_own
from otter_openclip.compare.packaged import find_towers
from otter_openclip.compare.recipe import (
    EPSILON,
    GLYPHS,
    INIT_SCALE,
    ITERATIONS,
    OWN,
    QUICK,
    Budget,
    flags,
)
from otter_openclip.compare.report import LABELS, Run, draw, print_table
from otter_openclip.files import write_json
from otter_openclip.model_folders.export import export_checkpoint
from otter_openclip.model_folders.towers import make_towers

# Marks a folder as ours. Only the parts are ever deleted, so a stray file of the user's survives.
SETTINGS_FILE = "otter-demo-settings.json"
PARTS = ("demo.json", "demo.png", "data", "exports", "features", "logs", "results", "towers")

# The towers', for the sake of time: the glyphs' own size, and a caption of some twenty words.
IMAGE_SIZE, CONTEXT = 112, 32
EXAMPLES, NAMES = 3, 5

_BAR = re.compile(r"^(?:(.*?): +)?\d+%\|.*\| (\d+)/(\d+) \[")
_STEPS = re.compile(r"Train Epoch: (\d+) \[ *(\d+)/(\d+) ")


def run(
    output: str | Path,
    *,
    seed: int = 0,
    all_losses: bool = False,
    quick: bool = False,
    data: str | None = None,
    test: str | None = None,
) -> int:
    """Run the whole chain into the folder ``output`` and print the table.

    Args:
        output: new, empty, or an earlier demo's folder, which is replaced.
        seed: of data, split and training.
        all_losses: also LS and KD.
        quick: a fraction of the steps.
        data: folder with shards of the user's own pairs, with ``test``; by default glyphs.
        test: clip_benchmark webdataset.

    Raises:
        ValueError: if a folder or ``seed`` cannot be used.
        RuntimeError: if the towers are not installed, or a command of the chain fails; its log is named
            and its end shown.
    """
    if seed < 0:
        raise ValueError(f"--seed must be at least 0, got {seed}")
    if (data is None) != (test is None):
        raise ValueError(
            "--data and --eval go together: pairs to train on, a test set to evaluate on"
        )
    started = time.monotonic()
    towers = find_towers()
    budget = QUICK if quick else GLYPHS if data is None else OWN
    losses = ("infonce", "ls", "kd", "otter") if all_losses else ("infonce", "otter")
    _check_output(Path(output), data, test)
    found = None
    if data is not None:
        found = find_own(data, test, least=budget.batch, most=budget.batch * budget.steps)
        tests = _open_tests(found, "--eval")
    output = _empty_folder(Path(output), {"seed": seed, "losses": losses, **budget._asdict()})
    if found is None:
        found = make_glyphs(output / "data", seed, pairs=budget.pairs, test=budget.test)
        tests = _open_tests(found, "the demo's")
    print(f"{found.pairs} training pairs; {budget.steps} steps of batch {budget.batch}")

    folder = make_towers(
        output / "towers",
        image_size=IMAGE_SIZE,
        context_length=CONTEXT,
        init_logit_scale=INIT_SCALE,
        seed=seed,
        **towers,
    )
    model = Towers(folder)
    for test_set in tests.values():
        test_set.encode(model)
    title, first = next(iter(tests.items()))
    chosen = first.examples(EXAMPLES, seed)
    commands = {loss: flags(loss, output, found, budget, seed) for loss in losses}
    runs, nearest = [], {}
    for loss, words in commands.items():
        seconds = _train(loss, words, output, budget)
        runs.append(Run(loss, seconds, _course(loss, output, budget, model, tests)))
        nearest[loss] = first.nearest(model, [example.number for example in chosen], NAMES)
    theirs = _clip_benchmark(runs, first, output) if first.multilabel else {}
    model.put_on(_checkpoint(output, "otter", budget.checkpoints), TEACHER)
    samples = _first_pairs(found, budget.batch)
    loss = OtterLoss(epsilon=EPSILON, iterations=ITERATIONS)
    targets, _ = loss.targets(*pair_features(model, *samples))

    draw(runs, (targets.numpy(), *samples), (chosen, nearest), output / "demo.png")
    report = {
        "seed": seed,
        "seconds": time.monotonic() - started,
        "budget": budget._asdict() | {"pairs": found.pairs},
        "commands": {
            loss: shlex.join(["otter-openclip", "train", *words])
            for loss, words in commands.items()
        },
        "versions": {
            name: metadata.version(name)
            for name in ("otter-openclip", "open_clip_torch", "clip-benchmark", "torch")
        },
        "runs": {run.loss: run._asdict() for run in runs},
        "clip_benchmark": theirs,
        "examples": {"names": [example.names for example in chosen], "nearest": nearest},
    }
    write_json(output / "demo.json", report)
    print_table(runs)
    print(
        f"{_verdict(runs, title, theirs)}\nOne seed ({seed}), {budget.steps} steps of batch "
        f"{budget.batch}: a demonstration, not a benchmark of the losses.\n{output / 'demo.png'}, "
        f"{output / 'demo.json'}; {report['seconds'] / 60:.1f} minutes"
    )
    return 0


def _open_tests(data: Data, flag: str) -> dict[str, TestSet]:
    return {title: TestSet(folder, flag) for title, folder in data.tests.items()}


def _check_output(output: Path, *inputs: str | None) -> None:
    """Raise ValueError unless ``output`` may be replaced."""
    for given in filter(None, inputs):
        if Path(given).resolve().is_relative_to(output.resolve()):
            raise ValueError(
                f"{given} is inside --output {output}, which is replaced; choose another"
            )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not (output / SETTINGS_FILE).is_file():
            raise ValueError(
                f"--output {output} exists and was not written by the demo; choose another folder"
            )


def _empty_folder(output: Path, settings: dict[str, Any]) -> Path:
    if (output / SETTINGS_FILE).exists():
        print(f"Replacing the earlier demo in {output}")
    for part in PARTS:
        path = output / part
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (output / "logs").mkdir(parents=True)
    (output / SETTINGS_FILE).write_text(json.dumps(settings) + "\n")
    return output.resolve()


def _train(loss: str, words: list[str], output: Path, budget: Budget) -> float:
    """Train with the real command; returns wall seconds."""
    began = time.monotonic()
    words = [sys.executable, "-m", "otter_openclip.train", *words]
    _command(words, output / "logs" / f"{loss}.log", f"Training {LABELS[loss]}", budget)
    return time.monotonic() - began


def _checkpoint(output: Path, loss: str, number: int) -> Path:
    return output / "logs" / loss / "checkpoints" / f"epoch_{number}.pt"


def _course(
    loss: str, output: Path, budget: Budget, model: Towers, tests: dict[str, TestSet]
) -> list[dict[str, Any]]:
    """Steps and metrics of each checkpoint; only the last one is kept, and its heads stay on."""
    course = []
    numbers = range(1, budget.checkpoints + 1)
    for number in tqdm(numbers, f"Evaluating {LABELS[loss]}", unit="checkpoint", leave=False):
        path = _checkpoint(output, loss, number)
        model.put_on(path)
        metrics = {title: test_set.metrics(model) for title, test_set in tests.items()}
        course.append({"step": number * budget.steps // budget.checkpoints, "tests": metrics})
        if number < budget.checkpoints:
            path.unlink()
    return course


def _clip_benchmark(runs: Sequence[Run], test_set: TestSet, output: Path) -> dict[str, float]:
    """Loss -> mAP of the exported model by stock clip_benchmark."""
    for run in runs:
        name = f"local-dir:{output / 'towers'}"
        export_checkpoint(output / "logs" / run.loss, output / "exports" / run.loss, model=name)
    results = output / "results"
    results.mkdir()
    words = [
        *(sys.executable, "-m", "clip_benchmark.cli", "eval"),
        *("--model", *(f"local-dir:{run.loss}" for run in runs), "--pretrained", ""),
        *("--dataset", "wds/test", "--dataset_root", str(test_set.folder)),
        *("--task", "zeroshot_classification", "--num_workers", "0", "--no_amp"),
        *("--batch_size", "64", "--output", str(results / "{model}.json")),
    ]
    log = output / "logs" / "clip_benchmark.log"
    _command(words, log, "clip_benchmark", folder=output / "exports")
    files = {run.loss: results / f"local-dir:{run.loss}.json" for run in runs}
    read = {loss: json.loads(file.read_text())["metrics"] for loss, file in files.items()}
    return {loss: metrics["mean_average_precision"] for loss, metrics in read.items()}


def _verdict(runs: Sequence[Run], title: str, theirs: dict[str, float]) -> str:
    if not theirs:
        return "Not compared with stock clip_benchmark, which has no mAP for one label a picture."
    ours = {run.loss: run.course[-1]["tests"][title]["mean_average_precision"] for run in runs}
    apart = max(abs(ours[loss] - theirs[loss]) for loss in ours)
    return (
        f"Stock clip_benchmark's mAP of the exported models on {title} "
        f"{'agrees with' if apart < 5e-4 else 'DIFFERS from'} ours (by up to {100 * apart:.3f} points)."
    )


def _command(
    words: list[str],
    log: Path,
    title: str,
    budget: Budget | None = None,
    folder: Path | None = None,
) -> None:
    """Run ``words`` in ``folder``; its progress is shown, its other output goes to ``log``.

    Raises:
        RuntimeError: with the end of the log, if it fails.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with (
        log.open("w") as file,
        subprocess.Popen(words, cwd=folder, env=environment, **pipes) as process,
        tqdm(desc=title, leave=False) as bar,
    ):
        for line in process.stdout:  # text mode ends lines at carriage returns, which bars have
            if found := _BAR.match(line):
                part, done, bar.total = found[1], int(found[2]), int(found[3])
            else:
                file.write(line)
                if not (found := budget and _STEPS.search(line)):
                    continue
                epoch, samples, in_all = map(int, found.groups())
                part, bar.total = "steps", budget.steps
                done = (epoch * in_all + samples) // budget.batch
            bar.set_description(f"{title}: {part.lower()}" if part else title, refresh=False)
            bar.n = done
            bar.refresh()
    if process.returncode:
        end = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{title} failed, see {log}:\n{end}")


def _first_pairs(data: Data, count: int) -> tuple[list[Any], list[str]]:
    """Pictures and captions of the first pairs, as training reads them."""
    samples = (
        webdataset.WebDataset(list(map(str, data.shards)), shardshuffle=False)
        .select(filter_no_caption_or_no_image)
        .decode("pilrgb", handler=log_and_continue)
        .rename(image="jpg;png;jpeg;webp", text="txt")
    )
    pairs = [(sample["image"], sample["text"]) for sample in islice(samples, count)]
    images, texts = zip(*pairs, strict=True)
    return list(images), list(texts)
