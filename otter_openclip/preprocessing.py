"""The paper's image preprocessing."""

from __future__ import annotations

from collections.abc import Sequence

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)


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
        size: of the crop; the shorter side becomes ``size * 256 / 224``.
        mean: of the channels, in [0, 1].
        std: of the channels.
    """
    return Compose(
        [
            Resize(round(size * 256 / 224), interpolation=InterpolationMode.BICUBIC),
            CenterCrop(size),
            _rgb,
            ToTensor(),
            Normalize(mean, std),
        ]
    )
