"""Ridges, power and scale without labels: by the likelihood of held-out pairs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from otter_openclip.closed_form.blocks import Block
from otter_openclip.closed_form.heads import Covariances, Setting, log_likelihood

IMAGE_RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
TEXT_RIDGES = (0.1, 1.0, 10.0)
POWERS = (0.5, 1.0, 1.5)
SCALES = (4.0, 8.0, 12.0, 18.0, 27.0)
CHOOSING = 3  # folds by which it is chosen
_BATCH = 1024  # pairs among which one is to be told
SETTINGS = [Setting(*each) for each in itertools.product(IMAGE_RIDGES, TEXT_RIDGES, POWERS)]


def choose(
    left_out: Sequence[Covariances],
    held_out: Sequence[Block],
    weights: Sequence[Tensor],
    settings: Sequence[Setting],
) -> tuple[Setting, float, float]:
    """The setting, and the scale, under which held-out pairs are likeliest, and how likely they are.

    Args:
        left_out: covariances of all pairs but those of a fold.
        held_out: pairs of that fold.
        weights: of these pairs, (n,).
        settings: among which is chosen.

    Returns:
        Setting, scale, and the mean log-likelihood of a pair, which is that of a text among the others
        for its image plus that of the image for its text, in nats.
    """
    totals = torch.zeros(len(settings), len(SCALES), dtype=torch.float64)
    ridges = sorted({(s.ridge_images, s.ridge_texts) for s in settings})
    folds = list(zip(left_out, held_out, weights, strict=True))
    bar = tqdm(total=len(folds) * len(ridges), desc="Choosing", unit="ridge", leave=False)
    with bar:
        for covariances, block, weight in folds:
            for ridge in ridges:
                directions = covariances.directions(*ridge)
                sides = directions.projected(block.images, block.texts)
                for number, setting in enumerate(settings):
                    if (setting.ridge_images, setting.ridge_texts) == ridge:
                        scaled = zip(sides, directions.scales(setting.power), strict=True)
                        embedded = [F.normalize(x * y.float(), dim=1) for x, y in scaled]
                        totals[number] += _held_out(*embedded, weight).cpu() / len(folds)
                bar.update()
    best = int(totals.argmax())
    setting, scale = divmod(best, len(SCALES))
    return settings[setting], SCALES[scale], float(totals.flatten()[best])


def _held_out(images: Tensor, texts: Tensor, weight: Tensor) -> Tensor:
    total, weight = weight.sum().clamp(min=1e-30), weight.float()
    return sum(
        log_likelihood(i, t, w, SCALES) * (w.sum() / total)
        for i, t, w in zip(*(x.split(_BATCH) for x in (images, texts, weight)), strict=True)
    )
