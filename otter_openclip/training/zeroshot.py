"""``--zeroshot-data``: F@K of the student at epoch ends, and the best epoch's checkpoint."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from clip_benchmark.datasets.builder import build_wds_dataset
from open_clip import get_input_dtype
from open_clip_train.precision import get_autocast
from timm.utils import unwrap_model
from torch import Tensor, nn

from otter_openclip.checkpoints.contents import (
    JUDGED,
    JUDGED_BY,
    JUDGED_WEIGHTS,
    read_file,
    write_file,
)
from otter_openclip.evaluation.classifier import class_features
from otter_openclip.evaluation.labelled_images import LabelledImages, encode_images
from otter_openclip.evaluation.metrics import KS, multilabel_metrics
from otter_openclip.evaluation.prompts import class_prompts
from otter_openclip.frozen import prefix
from otter_openclip.frozen.encode import fill, fingerprint
from otter_openclip.frozen.loader import image_column

BEST = "best.pt"


def _names(folders: Sequence[str]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart: ``eval``, or ``coco-eval``."""
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["-".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    return names


class ZeroShotEvaluation:
    """Labelled webdatasets, with one label or several a picture, evaluated while a model trains.

    It draws no random numbers of the process, so that a run with it and one without are the same run.

    Attributes:
        criterion: the name of the metric by which epochs are compared, F@1 of the first folder.
        judge: a fingerprint of that folder; figures of another cannot be compared with its own.
    """

    def __init__(self, folders: Sequence[str], transform: Callable[[Any], Tensor]) -> None:
        """Open the data sets; ``transform`` is of PIL images to tensors."""
        names = [f"{name}-" for name in _names(folders)] if len(folders) > 1 else [""]
        self._sets = [
            _LabelledSet(folder, f"zeroshot-{name}", transform)
            for folder, name in zip(folders, names, strict=True)
        ]
        self.criterion = f"{self._sets[0].label}flat_hit@{KS[0]}"
        self.judge = self._sets[0].fingerprint()

    def class_prompts(self) -> dict[str, list[str]]:
        """What they are of -> the first prompt of each class."""
        each = ((f"classes of {one.folder}", one.prompts) for one in self._sets)
        return {what: [prompts[0] for prompts in classes] for what, classes in each}

    def read_ahead(self, model: nn.Module, args: argparse.Namespace) -> None:
        """Read every sample, before the first epoch: hours later a fault would cost an evaluation.

        Raises:
            ValueError: naming folder, shard and sample that cannot be used.
        """
        for labelled in self._sets:
            try:
                if not labelled.use_features(unwrap_model(model), args):
                    labelled.images.shards.read_all()
            except ValueError as error:
                raise ValueError(
                    f"--zeroshot-data {labelled.folder} cannot be used: {error}"
                ) from error

    @torch.no_grad()
    def metrics(
        self, model: nn.Module, tokenizer: Any, epoch: int, args: argparse.Namespace
    ) -> dict[str, float]:
        """F@K and mean average precision of ``model``, in eval mode, under the run's autocast."""
        student, device = unwrap_model(model).eval(), torch.device(args.device)
        autocast = get_autocast(args.precision, device_type=device.type)
        metrics: dict[str, float] = {}
        for labelled in self._sets:
            prompts = labelled.prompts
            logging.info(f"Zero-shot evaluation on {labelled.folder}, {len(prompts)} classes")
            classes = class_features(student, tokenizer, prompts, device=device, autocast=autocast)
            features, labels = labelled.encoded(student, args)
            values = multilabel_metrics(features.float().to(device), classes.float(), labels, KS)
            metrics |= {f"{labelled.label}{name}": value for name, value in values.items()}
        return {**metrics, "epoch": epoch}


class _LabelledSet:
    """One folder of ``--zeroshot-data``; ``label`` is what its metrics' names begin with."""

    def __init__(self, folder: str, label: str, transform: Callable[[Any], Tensor]) -> None:
        dataset = build_wds_dataset("zeroshot", transform, "test", folder)
        self.folder, self.label = folder, label
        self.prompts, self.images = class_prompts(dataset), LabelledImages(dataset, transform)
        self._features: tuple[Tensor, Any] | None = None

    def fingerprint(self) -> str:
        """A digest of prompts and shards, wherever the folder lies."""
        shards = [(os.path.basename(url), os.path.getsize(url)) for url in self.images.shards.urls]
        return fingerprint({"prompts": self.prompts, "shards": shards})

    def use_features(self, model: nn.Module, args: argparse.Namespace) -> bool:
        """Whether ``--feature-cache`` has what the images give, which is made if it is not there."""
        name = prefix.installed(model, "visual")
        if args.feature_cache is None or name is None:
            return False
        shards, device = self.images.shards, torch.device(args.device)
        column = image_column(
            model,
            name,
            Path(args.feature_cache),
            self.images.transform,
            device=device,
            precision=args.precision,
            reference_crop=args.reference_crop,
        )
        labels = shards.read_all()
        fill([column], shards.urls, device=device, workers=args.workers)
        self._features = torch.from_numpy(column.files.whole(shards.urls)), labels
        return True

    def encoded(self, model: nn.Module, args: argparse.Namespace) -> tuple[Tensor, Any]:
        """Features and labels of the images."""
        device = torch.device(args.device)
        autocast = get_autocast(args.precision, device_type=device.type)
        if self._features is None:
            return encode_images(
                model,
                self.images,
                device=device,
                autocast=autocast,
                dtype=get_input_dtype(args.precision),
                batch_size=args.batch_size,
                workers=args.workers,
            )
        features, labels = self._features
        with autocast():
            parts = [
                F.normalize(model.encode_image(part.float().to(device)), dim=-1).cpu()
                for part in features.split(args.batch_size)
            ]
        return torch.cat(parts), labels


def due(epoch: int, args: argparse.Namespace) -> bool:
    """Whether ``--zeroshot-frequency`` wants an evaluation after ``epoch``, as open_clip reads it."""
    if args.zeroshot_frequency == 0:
        return False
    return epoch % args.zeroshot_frequency == 0 or epoch == args.epochs


class BestCheckpoint:
    """Keeps ``best.pt``, the checkpoint with the highest F@1, over resumes too."""

    def __init__(self, args: argparse.Namespace, evaluation: ZeroShotEvaluation) -> None:
        """Read the best value so far from ``best.pt`` if the run goes on from an earlier one."""
        self.path = Path(args.checkpoint_path) / BEST
        self.criterion, self.judge = evaluation.criterion, evaluation.judge
        self.value = -1.0
        if args.resume is not None and self.path.is_file():
            try:
                judged = read_file(self.path)[JUDGED]
                if judged.get(JUDGED_BY) != self.judge:
                    raise ValueError(f"{self.path} was judged by another --zeroshot-data")
                self.value = judged[self.criterion]
            except (ValueError, KeyError) as error:
                logging.warning(f"The best epoch is sought anew: {error}")

    def offer(
        self, metrics: dict[str, float], weights: str, make: Callable[[], dict[str, Any]]
    ) -> None:
        """Write ``make()``, the metrics and whose ``weights`` they are of if F@1 is higher than ever."""
        if metrics[self.criterion] <= self.value:
            return
        judged = {**metrics, JUDGED_WEIGHTS: weights, JUDGED_BY: self.judge}
        try:
            write_file(self.path, {**make(), JUDGED: judged})
        except OSError as error:  # the epoch's own checkpoint is still to come
            logging.warning(f"{self.path} cannot be written and stays as it was: {error}")
            return
        self.value = metrics[self.criterion]
        logging.info(f"Best F@1 so far, {self.value:.4f}: {self.path}")
