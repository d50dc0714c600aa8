"""The demo's run: data, towers, training with the real command, export, report.

The settings were fixed before any result on the glyphs was known, and are alike for every loss:

* The paper's batch of 512 and initial scale of exp(3.9).
* AdamW at 1e-3 with weight decay 0.1, a tenth of the steps as warmup, then a cosine: usual for heads.
* 300 steps on pairs of one's own: on some thousand photos the best number lay before, for either loss,
  so that the course shows both sides. 1,000 on glyphs, which are farther from what the towers know.
* OTTER's lambda is 0.08. The paper's 0.15 is for towers that are trained too; with these frozen ones
  0.08 had been tried on photos with captions.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import webdataset
from clip_benchmark.datasets.builder import build_wds_dataset
from open_clip_train.data import filter_no_caption_or_no_image, log_and_continue
from PIL import Image
from torch import Tensor

from otter_openclip import OtterLoss
from otter_openclip.compare.dataset import Data, find_pairs, make_glyphs
from otter_openclip.compare.demo_towers import find_towers
from otter_openclip.compare.report import LABELS, Example, Run, draw, print_table
from otter_openclip.evaluation.classifier import class_features
from otter_openclip.evaluation.prompts import class_prompts
from otter_openclip.evaluation.validator import check_webdataset
from otter_openclip.files import write_json
from otter_openclip.model_folders.export import export_checkpoint
from otter_openclip.model_folders.towers import make_towers

# Marks a folder as ours. Only the parts are ever deleted, so a stray file of the user's survives.
SETTINGS_FILE = "otter-demo-settings.json"
PARTS = ("demo.json", "demo.png", "data", "exports", "features", "logs", "results", "towers")

INIT_SCALE = 3.9
EPSILON, ITERATIONS = 0.08, 5
# The towers', for the sake of time: the glyphs' own size, and a caption of some twenty words.
IMAGE_SIZE, CONTEXT = 112, 32
EXAMPLES, NAMES = 3, 5
SETTINGS = ("--lr", "1e-3", "--wd", "0.1", "--workers", "1", "--save-frequency", "0")
LOCKS = ("--lock-image", "--lock-text", "--lock-text-freeze-layer-norm")


class Budget(NamedTuple):
    """What is spent on a run; ``pairs`` and ``test`` (for each test set) are of glyphs."""

    batch: int
    steps: int
    evaluations: int
    pairs: int = 0
    test: int = 0


OWN_PAIRS = Budget(batch=512, steps=300, evaluations=10)
GLYPHS = Budget(batch=512, steps=1000, evaluations=10, pairs=3072, test=600)
QUICK = Budget(batch=32, steps=12, evaluations=2, pairs=192, test=60)


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
        ValueError: if a folder cannot be used.
        RuntimeError: if the towers are not installed, or a command of the chain fails; its log is named
            and its end shown.
    """
    if (data is None) != (test is None):
        raise ValueError(
            "--data and --eval go together: pairs to train on, a test set to evaluate on"
        )
    started = time.monotonic()
    towers = find_towers()
    budget = QUICK if quick else GLYPHS if data is None else OWN_PAIRS
    losses = ("infonce", "ls", "kd", "otter") if all_losses else ("infonce", "otter")
    _check_output(Path(output), data, test)
    if data is not None:
        check_webdataset(test, flag="--eval")
        used = find_pairs(data, test, least=budget.batch, most=budget.batch * budget.steps)
    output = _empty_folder(Path(output), {"seed": seed, "losses": losses, **budget._asdict()})
    if data is None:
        used = make_glyphs(output / "data", seed, pairs=budget.pairs, test=budget.test)
    print(f"{used.pairs} training pairs; {budget.steps} steps of batch {budget.batch}")

    make_towers(
        output / "towers",
        image_size=IMAGE_SIZE,
        context_length=CONTEXT,
        init_logit_scale=INIT_SCALE,
        seed=seed,
        **towers,
    )
    title, first = next(iter(used.tests.items()))
    examples = _examples(first, seed)
    commands = {loss: flags(loss, output, used, budget, seed) for loss in losses}
    runs, nearest = [], {}
    for loss, words in commands.items():
        seconds = _train(loss, words, output)
        runs.append(Run(loss, seconds, _course(output / "logs" / loss, used, budget)))
        model = _export(output, loss, budget, "student", loss)
        nearest[loss] = model.nearest(first, [example.picture for example in examples])
    theirs = _clip_benchmark(runs, first, output)
    teacher = _export(output, "otter", budget, "teacher", "otter-teacher")
    samples = _first_pairs(used, budget.batch)
    loss = OtterLoss(epsilon=EPSILON, iterations=ITERATIONS)
    targets, _ = loss.targets(*teacher.encode(*samples))

    draw(runs, (targets.numpy(), *samples), (examples, nearest), output / "demo.png")
    report = {
        "seed": seed,
        "seconds": time.monotonic() - started,
        "budget": budget._asdict() | {"pairs": used.pairs},
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
        "examples": {"names": [example.names for example in examples], "nearest": nearest},
    }
    write_json(output / "demo.json", report)
    print_table(runs)
    print(
        f"{_verdict(runs, title, theirs)}\nOne seed ({seed}), {budget.steps} steps of batch "
        f"{budget.batch}: a demonstration, not a benchmark of the losses.\n{output / 'demo.png'}, "
        f"{output / 'demo.json'}; {report['seconds'] / 60:.1f} minutes"
    )
    return 0


def flags(loss: str, output: Path, data: Data, budget: Budget, seed: int) -> list[str]:
    """The training command's flags; an epoch is what lies between two evaluations."""
    steps = budget.steps // budget.evaluations
    words = [
        *("--loss", loss, "--model", f"local-dir:{output / 'towers'}", *LOCKS, *SETTINGS),
        *("--feature-cache", str(output / "features")),
        *("--train-data", "::".join(map(str, data.shards))),
        *("--zeroshot-data", *map(str, data.tests.values()), "--zeroshot-frequency", "1"),
        *("--train-num-samples", str(steps * budget.batch), "--epochs", str(budget.evaluations)),
        *("--logs", str(output / "logs"), "--name", loss, "--seed", str(seed)),
        *("--batch-size", str(budget.batch), "--warmup", str(budget.steps // 10)),
        *("--log-every-n-steps", str(max(1, steps // 5))),
    ]
    if loss == "otter":
        words += ["--sinkhorn-lambda", str(EPSILON), "--sinkhorn-iter", str(ITERATIONS)]
    return words


def _check_output(output: Path, *inputs: str | None) -> None:
    """Raise ValueError unless ``output`` may be replaced."""
    for path in filter(None, inputs):
        if Path(path).resolve().is_relative_to(output.resolve()):
            raise ValueError(
                f"{path} is inside --output {output}, which is replaced; choose another"
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
    (output / SETTINGS_FILE).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return output.resolve()


def _train(loss: str, words: list[str], output: Path) -> float:
    """Train with the real command; returns wall seconds."""
    began = time.monotonic()
    words = [sys.executable, "-m", "otter_openclip.train", *words]
    _command(words, output / "logs" / f"{loss}.log", f"Training {LABELS[loss]}")
    return time.monotonic() - began


def _course(logs: Path, data: Data, budget: Budget) -> list[dict[str, Any]]:
    """Steps and metrics of each evaluation, from the run's own results.

    ``--zeroshot-data`` names metrics after the folders, if there are several.
    """
    course = []
    for line in (logs / "checkpoints" / "results.jsonl").read_text(encoding="utf-8").splitlines():
        results, tests = json.loads(line), {}
        for title, folder in data.tests.items():
            prefix = f"zeroshot-{folder.name}-" if len(data.tests) > 1 else "zeroshot-"
            tests[title] = {
                name.removeprefix(prefix): value
                for name, value in results.items()
                if name.startswith(prefix)
            }
        step = int(results["epoch"]) * budget.steps // budget.evaluations
        course.append({"step": step, "tests": tests})
    return course


class Exported:
    """A model as stock open_clip loads it from its folder."""

    def __init__(self, folder: Path) -> None:
        name = f"local-dir:{folder}"
        self._model, _, self._transform = open_clip.create_model_and_transforms(name)
        self._tokenizer = open_clip.get_tokenizer(name)
        self._model.eval()

    @torch.no_grad()
    def encode(
        self, pictures: Sequence[Image.Image], texts: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """(N, D) unit-norm features of pairs, images' and texts'."""
        images = torch.stack([self._transform(picture) for picture in pictures])
        features = self._model.encode_image(images, normalize=True)
        return features, self._model.encode_text(self._tokenizer(list(texts)), normalize=True)

    @torch.no_grad()
    def nearest(self, folder: Path, pictures: Sequence[Image.Image]) -> list[list[str]]:
        """The names of each picture's nearest classes in the test set ``folder``."""
        dataset = _open(folder)
        prompts = class_prompts(dataset)
        classes = class_features(
            self._model, self._tokenizer, prompts, device="cpu", progress=False
        )
        images = torch.stack([self._transform(picture) for picture in pictures])
        similarity = self._model.encode_image(images, normalize=True) @ classes.T
        order = similarity.argsort(dim=1, descending=True)[:, :NAMES]
        return [[dataset.classes[c] for c in row] for row in order.tolist()]


def _export(output: Path, loss: str, budget: Budget, weights: str, name: str) -> Exported:
    checkpoint = output / "logs" / loss / "checkpoints" / f"epoch_{budget.evaluations}.pt"
    model = f"local-dir:{output / 'towers'}"
    return Exported(
        export_checkpoint(checkpoint, output / "exports" / name, model=model, weights=weights)
    )


def _open(folder: Path) -> Any:
    return build_wds_dataset(folder.name, lambda image: image, "test", str(folder))


def _examples(folder: Path, seed: int) -> list[Example]:
    """Some of a test set's first pictures, by lot, with the names of their classes."""
    dataset = _open(folder)
    names = dataset.classes
    first = list(islice(dataset, 500))
    numbers = sorted(random.Random(seed).sample(range(len(first)), min(EXAMPLES, len(first))))
    examples = []
    for picture, label in (first[number] for number in numbers):
        classes = [int(label)] if torch.as_tensor(label).ndim == 0 else label.nonzero()[0]
        examples.append(Example(picture.convert("RGB"), [names[c] for c in classes]))
    return examples


def _clip_benchmark(runs: Sequence[Run], test: Path, output: Path) -> dict[str, float]:
    """Loss -> mAP of the exported model by stock clip_benchmark; nothing for one label a picture."""
    kind = test / "dataset_type.txt"
    if not kind.is_file() or kind.read_text(encoding="utf-8").strip() != "multilabel":
        return {}
    results = output / "results"
    results.mkdir()
    words = [
        *(sys.executable, "-m", "clip_benchmark.cli", "eval"),
        *("--model", *(f"local-dir:{run.loss}" for run in runs), "--pretrained", ""),
        *("--dataset", "wds/test", "--dataset_root", str(test)),
        *("--task", "zeroshot_classification", "--num_workers", "0", "--no_amp"),
        *("--batch_size", "64", "--output", str(results / "{model}.json")),
    ]
    log = output / "logs" / "clip_benchmark.log"
    _command(words, log, "clip_benchmark", folder=output / "exports")
    files = {run.loss: results / f"local-dir:{run.loss}.json" for run in runs}
    metrics = {
        loss: json.loads(file.read_text(encoding="utf-8"))["metrics"]
        for loss, file in files.items()
    }
    return {loss: values["mean_average_precision"] for loss, values in metrics.items()}


def _verdict(runs: Sequence[Run], title: str, theirs: dict[str, float]) -> str:
    if not theirs:
        return "Not compared with stock clip_benchmark, which has no mAP for one label a picture."
    ours = {run.loss: run.course[-1]["tests"][title]["mean_average_precision"] for run in runs}
    apart = max(abs(ours[loss] - theirs[loss]) for loss in ours)
    return (
        f"Stock clip_benchmark's mAP of the exported models on {title} "
        f"{'agrees with' if apart < 5e-4 else 'DIFFERS from'} ours (by up to {100 * apart:.3f} points)."
    )


def _command(words: list[str], log: Path, title: str, folder: Path | None = None) -> None:
    """Run ``words`` in ``folder``; what it prints goes to ``log``.

    Raises:
        RuntimeError: with the end of the log, if it fails.
    """
    print(f"{title}: {log}", flush=True)
    with log.open("wb") as file:
        code = subprocess.run(words, cwd=folder, stdout=file, stderr=file).returncode
    if code:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
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
