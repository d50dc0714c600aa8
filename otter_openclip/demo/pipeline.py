"""The demo's run: data, training, export, evaluation, report."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from otter_openclip import OtterLoss
from otter_openclip.demo import dataset
from otter_openclip.demo.report import Row, draw, print_table
from otter_openclip.evaluation import multilabel_metrics
from otter_openclip.files import write_json

MODEL = "otter-glyph"
KS = (1, 5, 10)
# Marks a folder as ours. Only the parts are ever deleted, so a stray file of the user's survives.
SETTINGS_FILE = "otter-demo-settings.json"
PARTS = ("demo.json", "demo.png", "data", "exports", "logs", "results")
EPSILON, ITERATIONS = 0.15, 5


class Budget(NamedTuple):
    """What is spent on a run, the same for every loss."""

    pairs: int
    batch: int
    epochs: int
    test: int


FULL = Budget(pairs=3072, batch=512, epochs=56, test=600)
QUICK = Budget(pairs=192, batch=32, epochs=2, test=60)


def run(output: str | Path, *, seed: int = 0, all_losses: bool = False, quick: bool = False) -> int:
    """Run the whole chain into the folder ``output`` and print the table.

    Raises:
        ValueError: if ``output`` holds something other than an earlier demo, or ``seed`` is negative.
        RuntimeError: if a command of the chain fails; its log is named and its end shown.
    """
    if seed < 0:
        raise ValueError(f"--seed must be at least 0, got {seed}")
    started = time.monotonic()
    budget = QUICK if quick else FULL
    losses = ("infonce", "ls", "kd", "otter") if all_losses else ("infonce", "otter")
    output = _empty_folder(Path(output), {"seed": seed, "losses": losses, **budget._asdict()})
    (output / "logs").mkdir()

    rng = random.Random(seed)
    split = dataset.split_glyphs(rng, train=budget.pairs, test=budget.test)
    dataset.write_training_shards(split.train, output / "data" / "train", rng)
    tests = {}
    for name in ("unseen_characters", "unseen_face"):
        for kind in ("words", "names"):
            folder = output / "data" / f"{name}-{kind}"
            tests[folder.name] = dataset.write_test_set(
                getattr(split, name), folder, words=kind == "words"
            )
    print(
        f"{len(split.train)} training pairs of {len({g.character for g, _ in split.train})} "
        f"characters; tests: {len(split.unseen_characters)} pictures of characters never seen in "
        f"training, {len(split.unseen_face)} of the face {dataset.HELD_OUT_FACE}, likewise"
    )

    blind = {
        f"{name}@{k}": blind_flat_hit(labels, k) for name, (_, labels) in tests.items() for k in KS
    }
    rows = []
    for loss in losses:
        seconds = _train(loss, output, budget, seed)
        _export(loss, output, "student", loss)
        rows.append(Row(loss, seconds, _flat_hits(output / "exports" / loss, split, tests), {}))
    _export("otter", output, "teacher", "otter-teacher")
    for row, average_precision in zip(
        rows, _clip_benchmark(losses, tests, output, seed), strict=True
    ):
        row.mean_average_precision.update(average_precision)

    targets = _batch_targets(output / "exports" / "otter-teacher", output, budget, seed)
    draw(rows, targets, output / "demo.png", steps=_steps(budget), budget=budget._asdict())
    report = {
        "seed": seed,
        "quick": quick,
        "seconds": time.monotonic() - started,
        "budget": budget._asdict(),
        "model": MODEL,
        "commands": {
            loss: shlex.join(["otter-openclip", "train", *_flags(loss, output, budget, seed)])
            for loss in losses
        },
        "versions": {
            name: metadata.version(name)
            for name in ("otter-openclip", "open_clip_torch", "clip-benchmark", "torch")
        },
        "held_out_face": dataset.HELD_OUT_FACE,
        "blind_flat_hit": blind,
        "methods": {row.loss: row._asdict() for row in rows},
    }
    write_json(output / "demo.json", report)
    print_table(rows, blind)
    print(
        f"\nOne seed ({seed}), {_steps(budget)} steps of batch {budget.batch}: a check of the whole "
        "chain on real input, not a benchmark of the losses.\n"
        f"{output / 'demo.png'}, {output / 'demo.json'}; {report['seconds'] / 60:.1f} minutes"
    )
    return 0


def _steps(budget: Budget) -> int:
    return budget.pairs // budget.batch * budget.epochs


def _empty_folder(output: Path, settings: dict[str, Any]) -> Path:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not (output / SETTINGS_FILE).is_file():
            raise ValueError(
                f"--output {output} exists and was not written by the demo; choose another folder"
            )
        print(f"Replacing the earlier demo in {output}")
        for part in PARTS:
            path = output / part
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / SETTINGS_FILE).write_text(json.dumps(settings) + "\n")
    return output.resolve()


def _train(loss: str, output: Path, budget: Budget, seed: int) -> float:
    """Train with the real command; returns wall seconds."""
    command = [
        *(sys.executable, "-m", "otter_openclip.train"),
        *_flags(loss, output, budget, seed),
    ]
    log = output / "logs" / f"{loss}.log"
    # Torch's threads must not spin while the loader's workers need the cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    began = time.monotonic()
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process,
        tqdm(total=budget.epochs, desc=f"Training {loss}", unit="epoch") as bar,
    ):
        for line in process.stdout:
            file.write(line)
            if re.search(r"Train Epoch: \d+ \[.*\(100%\)", line):
                bar.update()
    if process.returncode:
        raise RuntimeError(f"training {loss} failed, see {log}:\n{_tail(log)}")
    return time.monotonic() - began


def _flags(loss: str, output: Path, budget: Budget, seed: int) -> list[str]:
    """The training command's flags."""
    steps = _steps(budget)
    flags = [
        *("--loss", loss, "--model", MODEL),
        *(
            "--train-data",
            str(output / "data" / "train" / f"{{00000..{dataset.SHARDS - 1:05d}}}.tar"),
        ),
        *("--logs", str(output / "logs"), "--name", loss, "--seed", str(seed)),
        *("--batch-size", str(budget.batch), "--epochs", str(budget.epochs), "--workers", "2"),
        *("--lr", "2e-3", "--wd", "0.1", "--warmup", str(steps // 10)),
        *("--aug-cfg", "scale=(0.8,1.0)"),
        *("--save-frequency", "0", "--log-every-n-steps", "1000000"),
    ]
    if loss in ("kd", "otter"):
        flags += ["--ema-decay", "0.99"]
    if loss == "otter":
        flags += ["--sinkhorn-lambda", str(EPSILON), "--sinkhorn-iter", str(ITERATIONS)]
    return flags


def _export(run_name: str, output: Path, weights: str, name: str) -> None:
    _command(
        [
            *(
                sys.executable,
                "-m",
                "otter_openclip.cli",
                "export",
                str(output / "logs" / run_name),
            ),
            *(str(output / "exports" / name), "--weights", weights),
        ],
        output,
        f"export-{name}",
    )


def _clip_benchmark(
    losses: Sequence[str], tests: dict[str, Any], output: Path, seed: int
) -> list[dict[str, float]]:
    """Stock ``clip_benchmark eval`` on the exported folders: test set -> mean average precision."""
    results = output / "results"
    results.mkdir()
    words = [name for name in tests if name.endswith("words")]
    _command(
        [
            *(sys.executable, "-m", "clip_benchmark.cli", "eval", "--seed", str(seed)),
            *("--model", *(f"local-dir:{loss}" for loss in losses), "--pretrained", ""),
            *("--dataset", *(f"wds/{name}" for name in words)),
            *("--dataset_root", str(output / "data" / "{dataset_cleaned}")),
            *("--task", "zeroshot_classification", "--num_workers", "0", "--no_amp"),
            *("--batch_size", "200", "--output", str(results / "{dataset}_{model}.json")),
        ],
        output / "exports",
        "clip_benchmark",
        output / "logs" / "clip_benchmark.log",
    )
    return [
        {
            name: json.loads((results / f"{name}_local-dir:{loss}.json").read_text())["metrics"][
                "mean_average_precision"
            ]
            for name in words
        }
        for loss in losses
    ]


def _command(command: list[str], folder: Path, name: str, log: Path | None = None) -> None:
    log = log or folder / "logs" / f"{name}.log"
    with log.open("w") as file:
        done = subprocess.run(
            command,
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    if done.returncode:
        raise RuntimeError(f"{name} failed, see {log}:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-15:])


@torch.no_grad()
def _flat_hits(folder: Path, split: dataset.Split, tests: dict[str, Any]) -> dict[str, float]:
    """F@K of an exported model on each test set, loaded with stock open_clip."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    scores = {}
    for name, (classes, labels) in tests.items():
        pictures = [image for _, image in getattr(split, name.split("-")[0])]
        images = model.encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True)
        texts = model.encode_text(tokenizer(classes), normalize=True)
        found = multilabel_metrics(images, texts, labels, KS)
        scores |= {f"{name}@{k}": found[f"flat_hit@{k}"] for k in KS}
    return scores


def blind_flat_hit(labels: np.ndarray, k: int) -> float:
    """F@K of always naming the k classes that are true most often in ``labels`` (N, C).

    A yardstick, not a method: it looks at the test set's labels and at no picture. Where a model's
    F@K is below it, the figure does not by itself show skill.
    """
    frequent = np.argsort(-labels.sum(axis=0, dtype=np.int64), kind="stable")[:k]
    return float(labels[:, frequent].any(axis=1).mean())


@torch.no_grad()
def _batch_targets(
    folder: Path, output: Path, budget: Budget, seed: int
) -> tuple[np.ndarray, list[Image.Image], list[str]]:
    """OT targets of one training batch (image rows) by the teacher, with its pictures and captions."""
    from webdataset import WebDataset

    shard = output / "data" / "train" / "00000.tar"
    samples = list(WebDataset(str(shard), shardshuffle=False).decode("pilrgb"))[: budget.batch]
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    images = model.encode_image(torch.stack([preprocess(s["png"]) for s in samples]))
    texts = model.encode_text(tokenizer([s["txt"] for s in samples]))
    loss = OtterLoss(epsilon=EPSILON, iterations=ITERATIONS)
    targets, _ = loss.targets(F.normalize(images, dim=1), F.normalize(texts, dim=1))
    return targets.numpy(), [s["png"] for s in samples], [s["txt"] for s in samples]
