"""matchings.png: the figures as one picture, with a block of each loss's targets."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.colors import PowerNorm
from PIL import Image

from otter_openclip.analysis.embedding import Embedded
from otter_openclip.analysis.matching import EDGES, NATS, in_batches
from otter_openclip.drawing import COLOURS, LABELS, draw_block, strongest_block
from otter_openclip.files import written_whole
from otter_openclip.losses import DistillationLoss, OtterLoss

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLOCK = 10
_SHADES = ("#7c1d10", "#c2452d", "#e39b8b")  # of batch sizes
_ON, _OFF = COLOURS["otter"], "#b9bec7"


def draw(path: Path, stats: Mapping[str, Any], pairs: Embedded, size: int) -> None:
    """Write the picture; the blocks are of pairs in the first batch of ``size``."""
    figure = plt.figure(figsize=(15, 9.6), dpi=100, layout="constrained")
    figure.get_layout_engine().set(rect=(0.005, 0.025, 0.99, 0.965))
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.55])
    matchings, ranks, curve = above.subplots(1, 3)
    _draw_matchings(matchings, stats["batches"][str(size)]["histogram"], size)
    _draw_ranks(ranks, stats["ranks"], len(pairs.captions))
    _draw_curve(curve, stats["batches"])
    for axes in (matchings, ranks, curve):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of other alphabets
        _draw_blocks(below, pairs, size)
        with written_whole(path) as file:
            figure.savefig(file, format="png")
    plt.close(figure)


def _draw_matchings(axes: Any, histogram: Mapping[str, list[float]], size: int) -> None:
    for name, colour, label in (
        ("off_diagonal", _OFF, "other captions"),
        ("diagonal", _ON, "own caption"),
    ):
        axes.stairs(histogram[name], EDGES, fill=True, color=colour, alpha=0.75, label=label)
    axes.set(xscale="log", yscale="log", xlabel="probability (softmax at scale 100)")
    axes.set(ylabel="entries a batch", title=f"The model's matching in batches of {size:,}")
    axes.legend(frameon=False, fontsize=9)


def _draw_ranks(axes: Any, ranks: Mapping[str, Any], count: int) -> None:
    for name, colour, label in (
        ("similarity", _ON, "the model's similarity"),
        ("neighbours", COLOURS["kd"], "neighbours"),
    ):
        found = ranks[name]
        shares = np.array(found["histogram"]) / count
        edges = np.linspace(0, 1, len(shares) + 1)
        words = f"by {label}: {found['at_chance']:.0%} at chance"
        axes.stairs(shares, edges, color=colour, lw=1.6, label=words)
        axes.axhline(found["at_chance"] / len(shares), color=colour, lw=0.8, ls=":")
    axes.set(xlabel="own picture's rank among all (0: nearest)", ylabel="share of captions")
    axes.set_title("Where captions' own pictures rank")
    axes.legend(frameon=False, fontsize=9)


def _draw_curve(axes: Any, batches: Mapping[str, Any]) -> None:
    for (size, found), colour in zip(batches.items(), _SHADES * len(batches), strict=False):
        curve = found["curve"]
        axes.plot(curve["lambda"], curve["entropy"], color=colour, label=f"batch {int(size):,}")
    axes.axhspan(*NATS, color="#2e7d46", alpha=0.12, lw=0, label="2 to 4 nats")
    axes.axvline(OtterLoss().epsilon, color="#8a8f98", lw=1, ls="--", label="default")
    axes.set(xscale="log", xlabel="lambda", ylabel="nats", title="Entropy of OTTER's targets")
    axes.legend(frameon=False, fontsize=9)


def _draw_blocks(figure: Any, pairs: Embedded, size: int) -> None:
    batch = in_batches(pairs.images, pairs.texts, size)[0]
    targets = {
        "infonce": torch.eye(size),
        "kd": DistillationLoss().targets(*batch)[0],
        "otter": OtterLoss().targets(*batch)[0],
    }
    chosen = strongest_block(targets["otter"].numpy(), min(BLOCK, size))
    images = [Image.open(io.BytesIO(pairs.thumbnails[i])) for i in chosen]
    captions = [pairs.captions[i] for i in chosen]
    whose = f"{len(chosen)} pairs of a batch of {size:,}, those that OTTER's plan matches most"
    figure.suptitle(f"Targets: {whose}", fontsize=11)
    blocks = figure.subplots(1, len(targets))
    for axes, (loss, target) in zip(blocks, targets.items(), strict=True):
        block = target.numpy()[np.ix_(chosen, chosen)]
        drawn = draw_block(axes, block, images, captions, norm=PowerNorm(0.5, 0, 1))
        axes.set_title(LABELS[loss], fontsize=11, color=COLOURS[loss], weight="bold")
    bar = figure.colorbar(drawn, ax=blocks, shrink=0.8, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.set_label("target mass (rows sum to 1 over the batch)")
