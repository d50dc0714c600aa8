"""A run of multi-label zero-shot classification in ``clip_benchmark eval``: its flags, its work."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import open_clip.model
import torch
import torch.distributed as dist
from clip_benchmark.cli import world_info_from_env
from torch import Tensor, nn

from otter_openclip.evaluation.class_cache import cached_class_features
from otter_openclip.evaluation.labelled_images import MultiLabelImages, encode_images
from otter_openclip.evaluation.metrics import KS, check_ks, multilabel_metrics
from otter_openclip.evaluation.prompts import class_prompts, read_templates
from otter_openclip.files import written_whole
from otter_openclip.preprocessing import evaluation_transform

DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "otter_openclip"


def _k(text: str) -> int:
    try:
        return check_ks([int(text)])[0]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"K must be a whole number of at least 1, got {text!r}; e.g. --ks 1 2 5 10"
        ) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to the parser of ``clip_benchmark eval``."""
    add = parser.add_argument_group("otter-openclip", "multi-label classification").add_argument
    add("--ks", type=_k, nargs="+", default=list(KS), help="K of F@K; default 1 2 5 10")
    add(
        "--templates",
        metavar="{simple,imagenet,FILE}",
        help="prompts: 'a photo of {}.', open_clip's 80 for ImageNet, or a file with one a line; "
        "default: the dataset's own",
    )
    add(
        "--reference_crop",
        action="store_true",
        help="resize to 256/224 of the model's image size, then crop, as the reference does",
    )
    add(
        "--load_truncated",
        action="store_true",
        help="use what is there of an incomplete image (grey elsewhere) instead of stopping",
    )
    add(
        "--class_cache",
        default=str(DEFAULT_CACHE),
        metavar="DIR",
        help="where class features are kept, '' for nowhere; default %(default)s",
    )


@contextlib.contextmanager
def templates_given(args: argparse.Namespace) -> Iterator[None]:
    """While it lasts, ``--templates`` are in ``args.custom_template_file``, for any dataset.

    Raises:
        ValueError: for ``--templates`` beside the other, or that are none.
    """
    if not args.templates:
        yield
        return
    if args.custom_template_file:
        raise ValueError("--templates and --custom_template_file exclude each other; drop one")
    templates = read_templates(args.templates)
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump({"imagenet1k": templates}, file)  # the key that clip_benchmark falls back on
        file.flush()
        args.custom_template_file = file.name
        yield


def join_ranks() -> tuple[int, int]:
    """Rank and number of the processes of ``--distributed``, which form the default group if several.

    Raises:
        ValueError: if the environment does not say where to meet.
    """
    local_rank, rank, world_size = world_info_from_env()
    if world_size > 1 and not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            raise ValueError(
                f"--distributed with {world_size} processes needs MASTER_ADDR and MASTER_PORT; launch "
                "with torchrun, or set them"
            )
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
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float]:
    """F@K and mean average precision, on every rank; rank 0 prints them.

    Args:
        model: in eval mode, on ``args.device``.
        dataset: a multi-label webdataset, as clip_benchmark opened it.
        transform: of PIL images to tensors.
        tokenizer: the model's.
        args: the flags of ``clip_benchmark eval`` and of ``add_arguments``.
        rank: of this process, in torch.distributed's default group if there are several.
        world_size: number of processes, which share the images out.

    Raises:
        ValueError: for class names, prompts, images or labels that cannot be used.
    """
    prompts = class_prompts(
        dataset,
        names_from=args.custom_classname_file,
        templates_from=args.custom_template_file,
    )
    images = MultiLabelImages(dataset, transform, len(prompts), load_truncated=args.load_truncated)
    images.check()
    kind = torch.device(args.device).type
    if kind == "cpu" and args.amp and rank == 0:
        logging.warning(
            "clip_benchmark's mixed precision is bfloat16 on a CPU; --no_amp is more exact there"
        )
    autocast = functools.partial(torch.autocast, kind, enabled=args.amp)
    classes = _classes(model, tokenizer, prompts, autocast, args) if rank == 0 else None
    encoded = encode_images(
        model,
        images,
        device=args.device,
        autocast=autocast,
        batch_size=args.batch_size,
        workers=args.num_workers,
        rank=rank,
        world_size=world_size,
        progress=rank == 0,
    )
    metrics = None
    if encoded is not None:
        _warn_about_metrics(encoded.labels, args.ks, len(prompts))
        with autocast():
            metrics = multilabel_metrics(
                encoded.features.to(args.device), classes, encoded.labels, args.ks, progress=True
            )
        print(", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    if world_size > 1:
        box = [metrics]
        dist.broadcast_object_list(box)
        (metrics,) = box
    return metrics


def _classes(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[str]],
    autocast: Any,
    args: argparse.Namespace,
) -> Tensor:
    """(C, D) features, or the mean of those in ``--load_clfs``, (D, C) each."""
    if args.load_clfs:
        loaded = {path: torch.load(path, map_location="cpu") for path in args.load_clfs}
        for path, classifier in loaded.items():
            if (found := classifier.shape[-1]) != len(prompts):
                raise ValueError(
                    f"--load_clfs {path} has {found} classes, the dataset {len(prompts)}"
                )
        parts = [loaded[path] / len(args.load_clfs) for path in args.load_clfs]
        features = sum(parts).T.to(args.device)
    else:
        folder = Path(args.class_cache).expanduser() if args.class_cache else None
        features = cached_class_features(
            model, tokenizer, prompts, device=args.device, autocast=autocast, folder=folder
        )
    if args.save_clf is not None:
        with written_whole(args.save_clf) as file:
            torch.save(features.T.contiguous(), file)
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
    if without := sum(len(label) == 0 for label in labels):
        logging.warning(
            f"{without} of {len(labels)} images have no true label; each counts as a miss in F@K"
        )
    if large := [k for k in ks if k > classes]:
        logging.warning(
            f"--ks {' '.join(map(str, large))}: more than the {classes} classes, so every image with a "
            "label is a hit"
        )
