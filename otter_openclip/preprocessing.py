"""Image sizes, and the paper's image preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    RandomCrop,
    Resize,
    ToTensor,
)

CROP_PCT = 224 / 256
"""Image size over the length that the shorter side is resized to; timm's name for it."""


def size_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of an image size, which open_clip gives as one number or as two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def evaluation_transform(
    size: int = 224,
    mean: Sequence[float] = OPENAI_DATASET_MEAN,
    std: Sequence[float] = OPENAI_DATASET_STD,
) -> Compose:
    """The reference's test transform: shorter side to 256 (bicubic), centre crop of 224.

    open_clip's own resizes to 224 and keeps everything along the shorter side.

    Args:
        size: of the crop; the shorter side becomes ``size / CROP_PCT``.
        mean: of the channels, in [0, 1].
        std: of the channels.
    """
    return Compose(
        [
            Resize(round(size / CROP_PCT), interpolation=InterpolationMode.BICUBIC),
            CenterCrop(size),
            _rgb,
            ToTensor(),
            Normalize(mean, std),
        ]
    )


def training_transform(
    size: int = 224,
    mean: Sequence[float] = OPENAI_DATASET_MEAN,
    std: Sequence[float] = OPENAI_DATASET_STD,
    interpolation: str = "bicubic",
) -> Compose:
    """The reference's training transform: shorter side to 256, random crop of 224, nothing else.

    Arguments as of :func:`evaluation_transform`, and the interpolation, "bicubic" or "bilinear", with
    which the reference trains on YFCC.
    """
    return Compose(
        [
            _rgb,
            Resize(round(size / CROP_PCT), interpolation=InterpolationMode(interpolation)),
            RandomCrop(size),
            ToTensor(),
            Normalize(mean, std),
        ]
    )


def reference_transforms(preprocess: Mapping[str, Any]) -> tuple[Compose, Compose]:
    """Training and evaluation transform for open_clip's ``preprocess_cfg`` of a model.

    Its interpolation is that of training; the reference evaluates with bicubic resizing throughout.
    """
    height, width = size_pair(preprocess["size"])
    if height != width:
        raise ValueError(f"--reference-crop crops squares, the model takes {height} x {width}")
    arguments = (height, preprocess["mean"], preprocess["std"])
    training = training_transform(*arguments, preprocess["interpolation"])
    return training, evaluation_transform(*arguments)
