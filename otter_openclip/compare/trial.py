"""One run of the training command in this process: what it is given, and what it measures.

What frozen towers give is kept, so that a run of some hundred steps takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from clip_benchmark.datasets.builder import build_wds_dataset
from torch import nn

from otter_openclip.evaluation.classifier import class_features
from otter_openclip.evaluation.prompts import class_prompts
from otter_openclip.shards.names import shard_names
from otter_openclip.terminating import EXIT_CODE
from otter_openclip.training.launcher import main as train
from otter_openclip.training.plugin import Plugin

EVALUATIONS = 5  # in the course of a run
METRICS = {"mAP": "mean_average_precision", "F@1": "flat_hit@1", "F@5": "flat_hit@5"}
PICTURES, NAMES = 12, 5  # that are shown, and that each is called
FIT = "fit"  # the method; "fit+LOSS" is a loss that starts from it
CLOSED_FORM = {"lr": 0.0, "steps": 1}  # a run that begins at it and learns nothing
Setting = Mapping[str, Any]  # of a run: flags of training, and "steps"


class Stop(Exception):
    """Raised when an evaluation is reported: the run is not worth its end."""


@dataclass(frozen=True)
class Place:
    """What runs have in common.

    Attributes:
        model: open_clip's name of it.
        train_data: shards, braces not expanded.
        tests: labelled webdatasets by name; by the last one pictures are named.
        work: folder for features.
        frozen: whether the model is two frozen towers under linear heads.
    """

    model: str
    train_data: str
    tests: Mapping[str, Path]
    work: Path
    frozen: bool = True

    @functools.cached_property
    def shards(self) -> list[str]:
        """Each once."""
        return shard_names("--train-data", self.train_data)

    def labelled(self, transform: Any) -> Any:
        """The last of the tests, as clip_benchmark opens it."""
        *_, folder = self.tests.values()
        return build_wds_dataset(folder.name, transform, "test", str(folder))

    @functools.cached_property
    def pictures(self) -> list[tuple[Any, list[str]]]:
        """Some pictures and their true names."""
        dataset = self.labelled(lambda image: image.convert("RGB"))
        first = islice(dataset, PICTURES)
        return [(image, [dataset.classes[c] for c in label.nonzero()[0]]) for image, label in first]


def flags(method: str, setting: Setting, place: Place) -> dict[str, Any]:
    """The training command's flags for a run, as a recipe has them; an epoch ends with an evaluation."""
    start, _, loss = method.rpartition("+")
    epochs = 1 if method == FIT else EVALUATIONS
    batch = setting.get("batch-size", 64)
    steps = max(1, round(setting["steps"] / epochs))
    recipe = {
        "loss": "infonce" if method == FIT else loss,
        "model": place.model,
        "train-data": place.train_data,
        "batch-size": batch,
        "epochs": epochs,
        "train-num-samples": steps * batch,
        "warmup": epochs * steps // 10,
        # open_clip's defaults depend on what the model's path looks like.
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        **{name: value for name, value in setting.items() if name != "steps"},
        "zeroshot-data": [str(folder) for folder in place.tests.values()],
        "zeroshot-frequency": 1,
        "save-frequency": 0,
    }
    if start or method == FIT:
        recipe["init"] = FIT
    if loss in ("kd", "otter") and "init-logit-scale" in setting:
        recipe["init-distill-logit-scale"] = setting["init-logit-scale"]
    if not place.frozen:
        return recipe | {"workers": min(os.cpu_count() or 1, len(place.shards))}
    locks = dict.fromkeys(("lock-image", "lock-text", "lock-text-freeze-layer-norm"), True)
    return recipe | locks | {"feature-cache": str(place.work / "features"), "workers": 0}


def run(
    method: str,
    setting: Setting,
    place: Place,
    seed: int,
    *,
    report: Callable[[int, float], None] = lambda epoch, value: None,
    name_pictures: bool = False,
    logs: Path | None = None,
) -> dict[str, Any]:
    """Train and measure.

    Args:
        method: a loss, ``fit`` or ``fit+LOSS``.
        setting: its.
        place: what runs have in common.
        seed: of the heads that are drawn and of the data's order.
        report: called with epoch and mAP on the first test after each evaluation; may raise Stop.
        name_pictures: whether the model names the place's pictures.
        logs: where the run leaves its folder ``run``; by default it leaves nothing.

    Returns:
        ``metrics`` by test and name; ``course``, steps and mAP on the last test; ``names`` of pictures.

    Raises:
        RuntimeError: with the end of what the command said, if it failed.
    """
    recipe = flags(method, setting, place)
    steps = recipe["train-num-samples"] // recipe["batch-size"]
    head_seed = None if FIT in method else seed
    switches = {"name_pictures": name_pictures, "leaves_nothing": logs is None}
    plugin = MeasuringPlugin(place, head_seed, steps, report, **switches)
    recipe |= {"log-every-n-steps": 1_000_000, "name": "run", "seed": seed}
    with tempfile.TemporaryDirectory() as nowhere, quietly():
        recipe["logs"] = logs or nowhere
        words = []
        for name, value in recipe.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(each) for each in values if each is not True)]
        if train(words, plugin=plugin) != 0:
            raise RuntimeError("the command returned an error")
    return plugin.outcome


class MeasuringPlugin(Plugin):
    """A run's plugin that also draws the heads anew, and measures at every evaluation."""

    def __init__(
        self,
        place: Place,
        head_seed: int | None,
        steps: int,
        report: Callable[[int, float], None],
        *,
        name_pictures: bool,
        leaves_nothing: bool,
    ) -> None:
        """As of ``run``; heads stay without a ``head_seed``, and an epoch has so many ``steps``."""
        super().__init__("train")
        self.place, self.head_seed, self.steps, self.report = place, head_seed, steps, report
        self.name_pictures, self.leaves_nothing = name_pictures, leaves_nothing
        self.transform = None
        self.outcome: dict[str, Any] = {"metrics": {}, "course": [], "names": []}

    def setup_model(self, args: Any, model: nn.Module, *transforms: Any) -> Any:
        """Draw the heads, and keep the pictures' transform."""
        if self.place.frozen and self.head_seed is not None:
            draw_heads(model, self.head_seed)
        *made, self.transform = self.hooks.setup_model(args, model, *transforms)
        return *made, self.transform

    def setup_data(self, args: Any, *data: Any) -> Any:
        """Keep open_clip from writing checkpoints if the run is to leave nothing."""
        if self.leaves_nothing:
            args.logs = "none"
        return self.hooks.setup_data(args, *data)

    def evaluate(self, args: Any, model: nn.Module, epoch: int, tokenizer: Any) -> dict[str, float]:
        """Add what is found to the outcome, and report it."""
        found, tests = self.hooks.evaluate(args, model, epoch, tokenizer), self.place.tests
        for test, folder in tests.items():
            prefix = f"zeroshot-{folder.name}-" if len(tests) > 1 else "zeroshot-"
            values = {name: found[prefix + long] for name, long in METRICS.items()}
            self.outcome["metrics"][test] = values
        self.outcome["course"].append((epoch * self.steps, values["mAP"]))
        if epoch == args.epochs and self.name_pictures:
            self.outcome["names"] = self._names(model, tokenizer)
        self.report(epoch, self.outcome["metrics"][next(iter(tests))]["mAP"])
        return found

    @torch.no_grad()
    def _names(self, model: nn.Module, tokenizer: Any) -> list[list[str]]:
        dataset, device = self.place.labelled(None), next(model.parameters()).device
        prompts = class_prompts(dataset)
        classes = class_features(model.eval(), tokenizer, prompts, device=device, progress=False)
        images = torch.stack([self.transform(picture) for picture, _ in self.place.pictures])
        similarity = model.encode_image(images.to(device), normalize=True) @ classes.T
        best = similarity.topk(min(NAMES, len(classes)), dim=1).indices
        return [[dataset.classes[c] for c in row] for row in best.tolist()]


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


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep what a command prints and logs; RuntimeError with the end of it if it fails."""
    root, text = logging.getLogger(), io.StringIO()
    level, handlers = root.level, list(root.handlers)
    root.handlers.clear()
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            yield
    except (Exception, SystemExit) as error:
        if isinstance(error, Stop) or getattr(error, "code", None) == EXIT_CODE:  # of SIGTERM
            raise
        if isinstance(error, SystemExit) and isinstance(error.code, str):  # one line that says it
            raise RuntimeError(error.code) from error
        tail = "\n".join(text.getvalue().splitlines()[-5:])
        raise RuntimeError(f"training failed: {error}\n{tail}") from error
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
