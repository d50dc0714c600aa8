"""A run of multi-label zero-shot classification in ``clip_benchmark eval``: its flags, its work."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from clip_benchmark.cli import world_info_from_env
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import get_model_preprocess_cfg
from torch import Tensor, nn

from otter_openclip import __version__
from otter_openclip.captions import cut_alike
from otter_openclip.cli import positive
from otter_openclip.evaluation.classifier import class_features
from otter_openclip.evaluation.labelled_images import (
    LabelledImages,
    encode_images,
    is_multilabel,
)
from otter_openclip.evaluation.metrics import KS, multilabel_metrics
from otter_openclip.evaluation.prompts import class_prompts, read_templates
from otter_openclip.files import written_whole
from otter_openclip.preprocessing import reference_transforms
from otter_openclip.shards.write import COUNT_FILE

NAMED_DATASETS = ("goi", "imagenet10k")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to the parser of ``clip_benchmark eval``."""
    add = parser.add_argument_group("otter-openclip", "multi-label classification").add_argument
    add("--ks", type=positive, nargs="+", default=list(KS), help="K of F@K; default 1 2 5 10")
    text = "prompts: 'a photo of {}.', open_clip's 80 for ImageNet, or a file with one a line; "
    text += "default: the dataset's own"
    add("--templates", metavar="{simple,imagenet,FILE}", help=text)
    text = "resize to 256/224 of the model's image size, then crop, as the reference does"
    add("--reference_crop", action="store_true", help=text)
    # Class features are no longer kept; command lines that say where still work.
    add("--class_cache", help=argparse.SUPPRESS)
    add("--version", action="version", version=f"otter-openclip {__version__}")


def named_root(name: str, root: str, split: str) -> str:
    """The webdataset of ``name``: the folder of that name in ``root``, if there is one, or ``root``."""
    inside = Path(root) / name
    return str(inside) if (inside / split / COUNT_FILE).is_file() else root


def templates_given(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """Has ``--templates`` in ``args.custom_template_file``, for any dataset, until it is left."""
    if not args.templates:
        return contextlib.nullcontext()
    if args.custom_template_file:
        raise ValueError("--templates and --custom_template_file exclude each other; drop one")
    templates = {"imagenet1k": read_templates(args.templates)}  # what clip_benchmark falls back on
    file = tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8")
    json.dump(templates, file)
    file.flush()
    args.custom_template_file = file.name
    return file


def how_measured(args: argparse.Namespace, dataset: Any) -> dict[str, Any]:
    """What a result file must say of a run beside clip_benchmark's: prompts and crop."""
    templates, source = dataset.templates, args.templates or args.custom_template_file
    if args.load_clfs:
        prompts = "class features of " + ", ".join(Path(path).name for path in args.load_clfs)
    elif isinstance(templates, list) and len(templates) == 1:
        prompts = templates[0]
    else:
        prompts = Path(source).name if source else "the data set's own"
        prompts += (
            f": {len(templates)} templates" if isinstance(templates, list) else " for each class"
        )
    cropped = args.reference_crop and is_multilabel(dataset)
    if cropped != args.reference_crop:
        logging.warning(
            "--reference_crop is for several labels a picture; here nothing is cropped so"
        )
    return {"templates": prompts, "reference_crop": cropped}


def join_ranks() -> tuple[int, int]:
    """Rank and number of the processes of ``--distributed``; several form the default group."""
    local_rank, rank, world_size = world_info_from_env()
    if world_size > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(days=1))
    return rank, world_size


def evaluate(
    model: nn.Module,
    dataset: Any,
    transform: Any,
    tokenizer: Any,
    args: argparse.Namespace,
    *,
    together: bool = False,
) -> dict[str, float]:
    """F@K and mean average precision, printed, of a multi-label webdataset that clip_benchmark opened.

    ``args`` are the flags of ``clip_benchmark eval`` and of ``add_arguments``. If the processes of the
    default group work ``together``, they share the images out; each returns the metrics.
    """
    prompts = class_prompts(dataset, args.custom_template_file)
    if args.reference_crop:
        transform = _reference_crop(model)
    images = LabelledImages(dataset, transform)
    autocast = functools.partial(torch.autocast, torch.device(args.device).type, enabled=args.amp)
    encoded = encode_images(
        model,
        images,
        device=args.device,
        autocast=autocast,
        batch_size=args.batch_size,
        workers=args.num_workers,
        together=together,
    )
    metrics = [None]
    if encoded is not None:
        features, labels = encoded
        if without := sum(len(label) == 0 for label in labels):
            logging.warning(f"{without} of {len(labels)} images have no true label: misses in F@K")
        classes = _classes(model, tokenizer, prompts, autocast, args)
        with autocast():
            metrics = [
                multilabel_metrics(
                    features.to(args.device), classes, labels, args.ks, progress=True
                )
            ]
        print(", ".join(f"{name} {value:.4f}" for name, value in metrics[0].items()))
    if together:
        dist.broadcast_object_list(metrics)
    return metrics[0]


def _classes(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[str]],
    autocast: Any,
    args: argparse.Namespace,
) -> Tensor:
    """(C, D) features, or the mean of those in ``--load_clfs``, (D, C) each."""
    if args.load_clfs:
        parts = [torch.load(path, "cpu", weights_only=True) for path in args.load_clfs]
        for path, part in zip(args.load_clfs, parts, strict=True):
            if part.shape[-1] != len(prompts):
                raise ValueError(
                    f"--load_clfs {path} has {part.shape[-1]} classes, not {len(prompts)}"
                )
        features = torch.stack(parts).mean(dim=0).T.to(args.device)
    else:
        if remark := cut_alike("class names", [each[0] for each in prompts], tokenizer):
            logging.warning(remark)
        features = class_features(model, tokenizer, prompts, device=args.device, autocast=autocast)
    if args.save_clf is not None:
        with written_whole(args.save_clf) as file:
            torch.save(features.T.contiguous(), file)
    return features


def _reference_crop(model: nn.Module) -> Any:
    """The reference's test transform for ``model``, whose images are square."""
    known = {"size": 224, "mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    known |= get_model_preprocess_cfg(model) | {"interpolation": "bicubic"}
    return reference_transforms(known)[1]
