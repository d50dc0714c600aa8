"""What pictures of losses have in common: their names and colours, a block of targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image

LABELS = {"infonce": "InfoNCE", "ls": "LS", "kd": "KD", "otter": "OTTER"}
COLOURS = {"infonce": "#8a8f98", "ls": "#d9a441", "kd": "#4f8fc0", "otter": "#c2452d"}
_THUMBNAIL = 100


def strongest_block(targets: np.ndarray, size: int) -> np.ndarray:
    """Indices of ``size`` pairs, grown greedily from the strongest match."""
    mass = targets + targets.T
    chosen = list(np.unravel_index(np.argmax(mass), mass.shape))
    while len(chosen) < size:
        gain = mass[chosen].sum(axis=0)
        gain[chosen] = -np.inf
        chosen.append(int(np.argmax(gain)))
    return np.asarray(chosen[:size])


def draw_block(
    axes: Any,
    block: np.ndarray,
    images: Sequence[Image.Image],
    captions: Sequence[str],
) -> Any:
    """Draw targets (n, n) with their pictures as rows and captions as columns; gives what was drawn."""
    places = range(len(block))
    drawn = axes.imshow(block, cmap="magma_r", vmin=0)
    # A caption may hold dollars that are no formula.
    text = {
        "rotation": 55,
        "ha": "right",
        "rotation_mode": "anchor",
        "fontsize": 7,
        "parse_math": False,
    }
    axes.set_xticks(places, [_short(caption) for caption in captions], **text)
    axes.set_yticks(places, [""] * len(block))
    axes.tick_params(length=0)
    for row, image in enumerate(images):
        thumbnail = image.convert("RGB").resize((_THUMBNAIL, _THUMBNAIL))
        picture = OffsetImage(np.asarray(thumbnail), zoom=20 / _THUMBNAIL)
        offset = {"xybox": (-14, 0), "boxcoords": "offset points", "frameon": False}
        axes.add_artist(AnnotationBbox(picture, (-0.5, row), **offset))
    axes.set_xlabel("caption in the batch")
    axes.set_ylabel("picture in the batch", labelpad=26)
    return drawn


def _short(caption: str) -> str:
    caption = " ".join(caption.split())
    return caption if len(caption) <= 26 else f"{caption[:25]}…"
