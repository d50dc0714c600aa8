"""``--zeroshot-data``: F@K of the student at epoch ends, and the best epoch's checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from clip_benchmark.datasets.builder import build_wds_dataset
from open_clip import get_input_dtype
from open_clip_train.distributed import world_info_from_env
from open_clip_train.precision import get_autocast
from timm.utils import unwrap_model
from torch import nn

from otter_openclip.checkpoints.contents import JUDGED, JUDGED_WEIGHTS, read_file, write_file
from otter_openclip.evaluation.classifier import class_features
from otter_openclip.evaluation.labelled_images import MultiLabelImages, encode_images
from otter_openclip.evaluation.metrics import KS, multilabel_metrics
from otter_openclip.evaluation.prompts import class_prompts
from otter_openclip.evaluation.validator import check_webdataset
from otter_openclip.frozen import prefix

BEST = "best.pt"
CRITERION = "zeroshot-flat_hit@1"


def check_folder(folder: str) -> None:
    """Raise ValueError unless ``folder`` is a multi-label clip_benchmark webdataset without a fault.

    Rank 0, which evaluates, reads all samples.
    """
    _, rank, _ = world_info_from_env()
    check_webdataset(folder, flag="--zeroshot-data", kinds=("npy",), samples=rank == 0)


class ZeroShotEvaluation:
    """A multi-label webdataset, evaluated while a model trains.

    It draws no random numbers of the process, so that a run with it and one without are the same run.
    """

    def __init__(self, folder: str, transform: Callable[[Any], torch.Tensor]) -> None:
        """Open the data set and look at its first sample.

        Args:
            folder: as ``otter-openclip data open-images`` writes it; see ``check_folder``.
            transform: of PIL images to tensors.

        Raises:
            ValueError: naming an image, a class name or a label vector that cannot be used.
        """
        self.transform = transform
        self.dataset = build_wds_dataset(
            "zeroshot", transform, "test", folder[0] if isinstance(folder, list) else folder
        )
        self.prompts = class_prompts(self.dataset)
        self._images().check()
        self._frozen: Any = None  # what a frozen prefix gives for the images, and their labels

    def _images(self) -> MultiLabelImages:
        return MultiLabelImages(self.dataset, self.transform, len(self.dataset.classes))

    def metrics(
        self, model: nn.Module, tokenizer: Any, epoch: int, args: argparse.Namespace
    ) -> dict[str, float]:
        """F@K and mean average precision of ``model``, in eval mode, under the run's autocast."""
        student = unwrap_model(model)
        device = torch.device(args.device)
        autocast = get_autocast(args.precision, device_type=device.type)
        logging.info(f"Zero-shot evaluation on {len(self.prompts)} classes")
        with torch.no_grad():
            classes = class_features(
                student, tokenizer, self.prompts, device=device, autocast=autocast
            )
            features, labels = self._encoded(
                student,
                device=device,
                autocast=autocast,
                dtype=get_input_dtype(args.precision),
                batch_size=args.batch_size,
                workers=args.workers,
            )
            found = multilabel_metrics(features.float().to(device), classes.float(), labels, KS)
        return {**{f"zeroshot-{name}": value for name, value in found.items()}, "epoch": epoch}

    def _encoded(self, model: nn.Module, **how: Any) -> tuple[torch.Tensor, Any]:
        """As ``encode_images``; images go through a frozen prefix once in a run."""
        if not prefix.installed(model, "visual"):
            return encode_images(model, self._images(), **how)
        if self._frozen is None:
            encode = functools.partial(prefix.run, model, "visual")
            self._frozen = encode_images(model, self._images(), encode=encode, **how)
        kept, labels = self._frozen
        with how["autocast"]():
            parts = [
                F.normalize(model.encode_image(part.to(how["device"])), dim=-1).cpu()
                for part in kept.split(how["batch_size"])
            ]
        return torch.cat(parts), labels


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` in eval mode while active, then each of its modules in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


def due(epoch: int, args: argparse.Namespace) -> bool:
    """Whether ``--zeroshot-frequency`` wants an evaluation after ``epoch``, as open_clip reads it."""
    if args.zeroshot_frequency == 0:
        return False
    return epoch % args.zeroshot_frequency == 0 or epoch == args.epochs


class BestCheckpoint:
    """Keeps ``best.pt``, the checkpoint with the highest F@1, over resumes too."""

    def __init__(self, folder: str, *, resumed: bool) -> None:
        """Read the best value so far from ``best.pt`` if the run goes on from an earlier one."""
        self.path = Path(folder) / BEST
        self.value = -1.0
        if resumed and self.path.is_file():
            try:
                self.value = read_file(self.path)[JUDGED][CRITERION]
            except (ValueError, KeyError) as error:
                logging.warning(f"The best epoch is sought anew: {error}")

    def offer(
        self, metrics: dict[str, float], weights: str, make: Callable[[], dict[str, Any]]
    ) -> None:
        """Write ``make()``, the metrics and whose ``weights`` they are of if F@1 is higher than ever."""
        if metrics[CRITERION] <= self.value:
            return
        try:
            write_file(self.path, {**make(), JUDGED: {**metrics, JUDGED_WEIGHTS: weights}})
        except OSError as error:  # the epoch's own checkpoint is still to come
            logging.warning(f"{self.path} cannot be written and stays as it was: {error}")
            return
        self.value = metrics[CRITERION]
        logging.info(f"Best F@1 so far, {self.value:.4f}: {self.path}")
