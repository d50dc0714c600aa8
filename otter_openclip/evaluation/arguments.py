"""The flags that multi-label evaluation adds to those of ``clip_benchmark eval``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from otter_openclip.zeroshot.metrics import KS, check_ks

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
    group = parser.add_argument_group("otter-openclip", "multi-label classification")
    group.add_argument(
        "--ks", type=_k, nargs="+", default=list(KS), help="K of F@K; default 1 2 5 10"
    )
    group.add_argument(
        "--templates",
        metavar="{simple,imagenet,FILE}",
        help="prompts: 'a photo of {}.', open_clip's 80 for ImageNet, or a file with one a line; "
        "default: the dataset's own",
    )
    group.add_argument(
        "--reference_crop",
        action="store_true",
        help="resize to 256/224 of the model's image size, then crop, as the reference does",
    )
    group.add_argument(
        "--load_truncated",
        action="store_true",
        help="use what is there of an incomplete image (grey elsewhere) instead of stopping",
    )
    group.add_argument(
        "--class_cache",
        default=str(DEFAULT_CACHE),
        metavar="DIR",
        help="where class features are kept, '' for nowhere; default %(default)s",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that exclude each other."""
    if args.templates and args.custom_template_file:
        raise ValueError("--templates and --custom_template_file exclude each other; drop one")
