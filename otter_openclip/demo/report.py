"""The demo's table and picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image

from otter_openclip.files import written_whole

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

LABELS = {"infonce": "InfoNCE", "ls": "LS", "kd": "KD", "otter": "OTTER"}
COLOURS = {"infonce": "#8a8f98", "ls": "#d9a441", "kd": "#4f8fc0", "otter": "#c2452d"}
TESTS = {"unseen_characters": "unseen characters", "unseen_face": "unseen face"}
BLOCK = 12


class Row(NamedTuple):
    """One method's figures; shares are in [0, 1].

    ``flat_hit`` maps ``TEST-{words,names}@K`` to F@K, ``mean_average_precision`` ``TEST-words`` to
    clip_benchmark's.
    """

    loss: str
    train_seconds: float
    flat_hit: dict[str, float]
    mean_average_precision: dict[str, float]


def print_table(rows: Sequence[Row], blind: dict[str, float]) -> None:
    """Print the figures, in percent; ``blind`` holds F@K of always naming the commonest classes."""
    print("\nF@1/5/10 (%): a true class among the 1, 5, 10 nearest. mAP (%): stock clip_benchmark.")
    print("blind: always the 1, 5, 10 commonest classes of the test set, whatever the picture.")
    print(
        f"{'test':<18} {'method':<8} {'words F@1/5/10':>19} {'full names F@1/5/10':>21} "
        f"{'words mAP':>10} {'train':>7}"
    )
    for test, title in TESTS.items():
        words, names = _rates(blind, test)
        print(f"{title:<18} {'blind':<8} {words:>19} {names:>21} {'':>10} {'':>7}".rstrip())
        for row in rows:
            words, names = _rates(row.flat_hit, test)
            precision = 100 * row.mean_average_precision[f"{test}-words"]
            print(
                f"{title:<18} {LABELS[row.loss]:<8} {words:>19} {names:>21} {precision:>10.1f} "
                f"{row.train_seconds:>6.0f}s"
            )


def _rates(flat_hit: dict[str, float], test: str) -> tuple[str, ...]:
    """F@1/5/10 over the words and over the full names."""
    return tuple(
        "/".join(f"{100 * flat_hit[f'{test}-{kind}@{k}']:.1f}" for k in (1, 5, 10))
        for kind in ("words", "names")
    )


def draw(
    rows: Sequence[Row],
    batch: tuple[np.ndarray, list[Image.Image], list[str]],
    path: Path,
    *,
    steps: int,
    budget: dict[str, Any],
) -> None:
    """Write the table as bars and a block of one batch's OT targets as a heatmap, as one PNG."""
    figure = plt.figure(figsize=(13, 5.6), dpi=100, layout="constrained")
    bars, heatmap = figure.subplots(1, 2, width_ratios=[1, 1.05])
    _draw_bars(bars, rows, steps, budget)
    _draw_targets(figure, heatmap, *batch)
    with written_whole(path) as file:
        figure.savefig(file, format="png")
    plt.close(figure)


def _draw_bars(axes: plt.Axes, rows: Sequence[Row], steps: int, budget: dict[str, Any]) -> None:
    groups = [(t, kind, k) for t in TESTS for kind in ("words", "names") for k in (1, 5, 10)]
    places = np.arange(len(groups)) + np.repeat(np.arange(len(groups) // 3), 3) * 0.6
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        heights = [100 * row.flat_hit[f"{t}-{kind}@{k}"] for t, kind, k in groups]
        at = places + (i - (len(rows) - 1) / 2) * width
        axes.bar(at, heights, width, label=LABELS[row.loss], color=COLOURS[row.loss])
        if len(rows) <= 2:
            for x, height in zip(at, heights, strict=True):
                axes.text(x, height, f"{height:.0f}", ha="center", va="bottom", fontsize=7)
    axes.set_xticks(places, [f"F@{k}" for _, _, k in groups], fontsize=7)
    for start, (test, kind) in zip(
        places[::3], [(t, kind) for t in TESTS for kind in ("words", "full names")], strict=True
    ):
        axes.text(
            start + 1, -0.09, f"{TESTS[test]}\n{kind}", ha="center", va="top", fontsize=8.5,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.set_ylabel("images with a true class among the nearest K (%)")
    axes.set_title(
        f"Zero-shot glyphs: {budget['pairs']} pairs, batch {budget['batch']}, {steps} steps, one seed",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")


def _draw_targets(
    figure: plt.Figure,
    axes: plt.Axes,
    targets: np.ndarray,
    images: Sequence[Image.Image],
    captions: Sequence[str],
) -> None:
    chosen = strongest_block(targets, min(BLOCK, len(targets)))
    block = targets[np.ix_(chosen, chosen)]
    size = len(chosen)
    shown = axes.imshow(block, cmap="magma_r", vmin=0)
    figure.colorbar(shown, ax=axes, shrink=0.75, label="target mass (rows sum to 1 over the batch)")
    axes.set_xticks(
        range(size), [_short(captions[i]) for i in chosen], rotation=55, ha="right", fontsize=7
    )
    axes.set_yticks(range(size), [""] * size)
    axes.tick_params(length=0)
    for row, index in enumerate(chosen):
        picture = OffsetImage(np.asarray(images[index]), zoom=0.62, cmap="gray")
        axes.add_artist(
            AnnotationBbox(
                picture, (-0.5, row), xybox=(-14, 0), boxcoords="offset points", frameon=False
            )
        )
    axes.set_xlabel("caption in the batch")
    axes.set_ylabel("picture in the batch", labelpad=26)
    axes.set_title(
        f"OTTER's targets: {size} of the batch's {len(targets)} pairs, those that match each other most",
        fontsize=10,
    )


def _short(caption: str) -> str:
    return caption if len(caption) <= 26 else f"{caption[:25]}…"


def strongest_block(targets: np.ndarray, size: int) -> np.ndarray:
    """Indices of ``size`` pairs, grown greedily from the strongest match."""
    mass = targets + targets.T
    chosen = list(np.unravel_index(np.argmax(mass), mass.shape))
    while len(chosen) < size:
        gain = mass[chosen].sum(axis=0)
        gain[chosen] = -np.inf
        chosen.append(int(np.argmax(gain)))
    return np.asarray(chosen[:size])
