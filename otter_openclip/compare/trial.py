"""One run of the training command in this process: what it is given, and what it measures.

What frozen towers give is kept, so that a run of some hundred steps takes seconds. Nothing of a run is
left on the disk unless its checkpoint is wanted.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clip_benchmark.datasets.builder import build_wds_dataset
from torch import nn

from otter_openclip.evaluation.classifier import class_features
from otter_openclip.evaluation.prompts import class_prompts
from otter_openclip.terminating import EXIT_CODE
from otter_openclip.training.launcher import main as train
from otter_openclip.training.plugin import Plugin

EVALUATIONS = 5  # in the course of a run
NAMES = 5  # that a picture is called
METRICS = {"mAP": "mean_average_precision", "F@1": "flat_hit@1", "F@5": "flat_hit@5"}
FIT = "fit"
LABELS = {"infonce": "InfoNCE", "ls": "LS", "kd": "KD", "otter": "OTTER", FIT: "closed form"}

Setting = dict[str, Any]  # flags of training, and "steps"


def label(method: str) -> str:
    """A method as pages call it."""
    start, _, loss = method.rpartition("+")
    return f"{LABELS[loss]} from the closed form" if start else LABELS[loss]


def closed_form() -> Setting:
    """Of the method ``fit``: a run that begins at it and learns nothing."""
    return {"lr": 0.0, "steps": 1}


@dataclass
class Place:
    """What runs have in common.

    Attributes:
        model: open_clip's name of it.
        train_data: shards, braces not expanded.
        tests: labelled webdatasets by name; a run's metrics are of each.
        work: folder for features and logs.
        frozen: whether both towers are frozen under linear heads, and their features kept.
        workers: processes that read images.
        pictures: of the last of the ``tests``, that methods name.
    """

    model: str
    train_data: str
    tests: dict[str, Path]
    work: Path
    frozen: bool = True
    workers: int = 0
    pictures: Sequence[Any] = field(default_factory=list)


class Outcome(NamedTuple):
    """Metrics by test and name, at the end and in the course; what the pictures are called."""

    metrics: dict[str, dict[str, float]]
    course: list[tuple[int, dict[str, float]]]  # steps, mAP by test
    names: list[list[str]]


def flags(method: str, setting: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """The training command's flags; switches are True."""
    setting, (start, _, loss) = dict(setting), method.rpartition("+")
    total, epochs = setting.pop("steps"), EVALUATIONS
    if method == FIT:
        start, loss, epochs = FIT, "infonce", 1
    steps = max(1, round(total / epochs))
    locked = {"lock-image": True, "lock-text": True, "lock-text-freeze-layer-norm": True}
    locked |= {"feature-cache": str(place.work / "features")}
    if loss in ("kd", "otter") and "init-logit-scale" in setting:
        setting["init-distill-logit-scale"] = setting["init-logit-scale"]
    batch = setting.setdefault("batch-size", 64)
    return {
        "loss": loss,
        "model": place.model,
        "train-data": place.train_data,
        # An epoch is what lies between two evaluations.
        "epochs": epochs,
        "train-num-samples": steps * batch,
        "warmup": epochs * steps // 10,
        # open_clip's defaults depend on what the model's path looks like.
        **{"beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
        **(locked if place.frozen else {}),
        **({"init": FIT} if start else {}),
        **setting,
        "workers": place.workers,
    }


def words(flags: Mapping[str, Any]) -> list[str]:
    """A command line of flags."""
    line = []
    for name, value in flags.items():
        line += [f"--{name}"] if value is True else [f"--{name}", *map(str, _as_list(value))]
    return line


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def run(
    method: str,
    setting: Mapping[str, Any],
    place: Place,
    seed: int,
    *,
    tests: Sequence[str] = (),
    report: Callable[[int, float], None] = lambda epoch, value: None,
    name_pictures: bool = False,
    logs: Path | None = None,
) -> Outcome:
    """Train and measure.

    Args:
        method: a loss, ``fit``, or ``fit+LOSS`` for what starts from the closed form.
        setting: of it.
        place: what runs have in common.
        seed: of the heads that are drawn and of the data's order.
        tests: those of the place that are evaluated; by default all.
        report: called with epoch and mAP on the first of them after each evaluation; what it raises
            ends the run.
        name_pictures: whether the model names the place's pictures.
        logs: a folder for the run's own folder ``run``, checkpoints in it.

    Raises:
        RuntimeError: with the end of what the command said, if it failed.
    """
    tests = list(tests) or list(place.tests)
    drawn = place.frozen and FIT not in method
    watching = _Watching(tests, place, seed if drawn else None, report, name_pictures)
    given = flags(method, setting, place)
    given |= {"zeroshot-data": [str(place.tests[name]) for name in tests], "seed": seed}
    given |= {"zeroshot-frequency": 1, "save-frequency": 0}
    given |= {"log-every-n-steps": 1_000_000, "name": "run"}
    with tempfile.TemporaryDirectory(dir=place.work) as nowhere, quietly():
        given["logs"] = logs or nowhere
        watching.leaves_nothing = logs is None
        if train(words(given), plugin=watching) != 0:
            raise RuntimeError("the command returned an error")
    steps = given["train-num-samples"] // given["batch-size"]
    course = [
        (epoch * steps, {test: found["mAP"] for test, found in metrics.items()})
        for epoch, metrics in watching.evaluations
    ]
    return Outcome(watching.evaluations[-1][1], course, watching.names)


class Stop(Exception):
    """Raised by ``report``: the run is not worth its end."""


class _Watching(Plugin):
    """The plugin of a run, with eyes: it draws the heads anew and hears of every evaluation."""

    def __init__(
        self, tests: list[str], place: Place, seed: int | None, report: Any, names: bool
    ) -> None:
        super().__init__("train")
        self.tests, self.place, self.seed, self.report = tests, place, seed, report
        self.wants_names, self.leaves_nothing = names, True
        self.transform: Any = None
        self.names: list[list[str]] = []
        self.evaluations: list[tuple[int, dict[str, dict[str, float]]]] = []

    def setup_model(self, args: Any, model: nn.Module, *transforms: Any) -> Any:
        """Model: heads of the run's own seed."""
        if self.seed is not None:
            draw_heads(model, self.seed)
        made = self.hooks.setup_model(args, model, *transforms)
        self.transform = made[-1]
        return made

    def setup_data(self, args: Any, *data: Any) -> Any:
        """Data."""
        if self.leaves_nothing:
            args.logs = "none"  # where open_clip writes no checkpoint
        return self.hooks.setup_data(args, *data)

    def evaluate(self, args: Any, model: nn.Module, epoch: int, tokenizer: Any) -> dict[str, float]:
        """Evaluation."""
        found = self.hooks.evaluate(args, model, epoch, tokenizer)
        metrics = {}
        for test in self.tests:
            prefix = f"zeroshot-{self.place.tests[test].name}-" if len(self.tests) > 1 else "zeroshot-"
            metrics[test] = {name: found[prefix + long] for name, long in METRICS.items()}
        self.evaluations.append((epoch, metrics))
        if epoch == args.epochs and self.wants_names:
            self.names = nearest(model, tokenizer, self.transform, self.place)
        self.report(epoch, metrics[self.tests[0]]["mAP"])
        return found


def draw_heads(model: nn.Module, seed: int) -> None:
    """Draw both towers' heads anew; a head that is the identity stays it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for head in (model.visual.head, model.text.proj):
            for module in head.modules():
                weight = getattr(module, "weight", None)
                square = weight is not None and weight.ndim == 2 and len(set(weight.shape)) == 1
                identity = square and torch.equal(weight, torch.eye(len(weight)).to(weight))
                if hasattr(module, "reset_parameters") and not identity:
                    module.reset_parameters()


def labelled(folder: Path, count: int) -> list[tuple[Any, list[int]]]:
    """Pictures and the classes of the first samples of a labelled webdataset with label vectors."""
    dataset = build_wds_dataset(folder.name, lambda image: image, "test", str(folder))
    samples = islice(dataset, count)
    return [(image.convert("RGB"), label.nonzero()[0].tolist()) for image, label in samples]


@torch.no_grad()
def nearest(model: nn.Module, tokenizer: Any, transform: Any, place: Place) -> list[list[str]]:
    """The names of each picture's nearest classes, in the last of the place's tests."""
    *_, folder = place.tests.values()
    dataset = build_wds_dataset(folder.name, None, "test", str(folder))
    device = next(model.parameters()).device
    classes = class_features(
        model.eval(), tokenizer, class_prompts(dataset), device=device, progress=False
    )
    images = torch.stack([transform(picture) for picture in place.pictures]).to(device)
    similarity = model.encode_image(images, normalize=True) @ classes.T
    best = similarity.topk(min(NAMES, len(classes)), dim=1).indices
    return [[dataset.classes[c] for c in row] for row in best.tolist()]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep what a command prints and logs; RuntimeError with the end of it if it fails."""
    root, text = logging.getLogger(), io.StringIO()
    level, handlers = root.level, list(root.handlers)
    root.handlers.clear()
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            yield
    except Stop:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code == EXIT_CODE:  # SIGTERM
            raise
        tail = "\n".join(text.getvalue().splitlines()[-15:])
        raise RuntimeError(f"training failed: {error}\n{tail}") from error
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
