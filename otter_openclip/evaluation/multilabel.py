"""Multi-label zero-shot classification of a clip_benchmark webdataset, in bounded memory."""

from __future__ import annotations

import argparse
import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip.model
import torch
import torch.distributed as dist
from torch import Tensor, nn

from otter_openclip.evaluation.datasets import TEMPLATES_FILE
from otter_openclip.preprocessing import evaluation_transform
from otter_openclip.zeroshot.classifier import (
    cached_class_features,
    check_classnames,
    make_prompts,
)
from otter_openclip.zeroshot.images import MultiLabelImages, encode_images
from otter_openclip.zeroshot.metrics import multilabel_metrics


def evaluate(
    model: nn.Module,
    images: MultiLabelImages,
    tokenizer: Any,
    classnames: Sequence[str],
    templates: Any,
    args: argparse.Namespace,
    *,
    device: str,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float]:
    """F@K and mean average precision, on every rank; rank 0 prints them.

    Args:
        model: in eval mode, on ``device``.
        images: of the dataset.
        tokenizer: the model's.
        classnames: C names.
        templates: a list with ``{c}`` for the name, or a dict of each name's prompts.
        args: the flags of ``clip_benchmark eval`` and of ``evaluation.arguments``.
        device: as clip_benchmark names it.
        rank: of this process, in torch.distributed's default group if there are several.
        world_size: number of processes, which share the images out.

    Raises:
        ValueError: for class names, prompts, images or labels that cannot be used.
    """
    check_classnames(classnames, "class names")
    try:
        prompts = make_prompts(classnames, templates)
    except ValueError as error:
        raise ValueError(
            f"{error}; correct {args.custom_template_file or TEMPLATES_FILE}, or pass --templates"
        ) from None
    images.check()
    kind = torch.device(device).type
    if kind == "cpu" and args.amp and rank == 0:
        logging.warning(
            "clip_benchmark's mixed precision is bfloat16 on a CPU; --no_amp is more exact there"
        )
    autocast = functools.partial(torch.autocast, kind, enabled=args.amp)
    classes = None
    if rank == 0:
        classes = _classes(model, tokenizer, prompts, torch.device(device), autocast, args)
    encoded = encode_images(
        model,
        images,
        device=device,
        autocast=autocast,
        batch_size=args.batch_size,
        workers=args.num_workers,
        rank=rank,
        world_size=world_size,
        progress=rank == 0,
    )
    metrics = None
    if encoded is not None:
        _warn_about_metrics(encoded.labels, args.ks, len(classnames))
        with autocast():
            metrics = multilabel_metrics(
                encoded.features.to(device), classes, encoded.labels, args.ks, progress=True
            )
    if world_size > 1:
        box = [metrics]
        dist.broadcast_object_list(box)
        (metrics,) = box
    if rank == 0:
        print(", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return metrics


def _classes(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[str]],
    device: torch.device,
    autocast: Any,
    args: argparse.Namespace,
) -> Tensor:
    """(C, D) features, or the mean of those in ``--load_clfs``, (D, C) each."""
    if args.load_clfs:
        loaded = [torch.load(path, map_location="cpu") for path in args.load_clfs]
        for path, classifier in zip(args.load_clfs, loaded, strict=True):
            if classifier.shape[-1] != len(prompts):
                raise ValueError(
                    f"--load_clfs {path} has {classifier.shape[-1]} classes, the dataset "
                    f"{len(prompts)}"
                )
        features = sum(classifier / len(loaded) for classifier in loaded).T.to(device)
    else:
        folder = args.class_cache
        features = cached_class_features(
            model,
            tokenizer,
            prompts,
            device=device,
            autocast=autocast,
            folder=Path(folder).expanduser() if folder else None,
            progress=True,
        )
    if args.save_clf is not None:
        temporary = f"{args.save_clf}.tmp"
        torch.save(features.T.contiguous(), temporary)
        os.replace(temporary, args.save_clf)
    return features


def reference_crop(model: nn.Module) -> Any:
    """The reference's test transform for ``model``, an open_clip model with square images."""
    config = open_clip.model.get_model_preprocess_cfg(model)
    size = config.get("size", 224)
    if not isinstance(size, int):
        if len(set(size)) > 1:
            raise ValueError(f"--reference_crop crops squares, the model's image size is {size}")
        size = size[0]
    known = {key: config[key] for key in ("mean", "std") if key in config}
    return evaluation_transform(size, **known)


def _warn_about_metrics(labels: Sequence[Any], ks: Sequence[int], classes: int) -> None:
    without = sum(len(label) == 0 for label in labels)
    if without:
        logging.warning(
            f"{without} of {len(labels)} images have no true label; each counts as a miss in F@K"
        )
    large = [k for k in ks if k > classes]
    if large:
        logging.warning(
            f"--ks {' '.join(map(str, large))}: more than the {classes} classes, so every image with a "
            "label is a hit"
        )
