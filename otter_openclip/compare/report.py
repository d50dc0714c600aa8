"""The demo's table and picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image

from otter_openclip.files import written_whole

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LABELS = {"infonce": "InfoNCE", "ls": "LS", "kd": "KD", "otter": "OTTER"}
COLOURS = {"infonce": "#8a8f98", "ls": "#d9a441", "kd": "#4f8fc0", "otter": "#c2452d"}
RIGHT = "#2e7d46"
KS = (1, 5, 10)
METRICS = {"flat_hit@5": "F@5 (%)", "mean_average_precision": "mAP (%)"}
BLOCK = 12
_THUMBNAIL = 100


class Example(NamedTuple):
    """A test picture, with the names of its classes."""

    picture: Image.Image
    names: list[str]


class Run(NamedTuple):
    """One loss's run; shares are in [0, 1].

    ``course`` has for each evaluation its ``step`` and, under ``tests``, each test set's metrics.
    """

    loss: str
    train_seconds: float
    course: list[dict[str, Any]]

    def best(self, test: str) -> dict[str, Any]:
        """The evaluation with the highest mAP on ``test``, the first of equal ones."""
        return max(self.course, key=lambda at: at["tests"][test]["mean_average_precision"])


def print_table(runs: Sequence[Run]) -> None:
    """Print the figures, in percent."""
    ks = "/".join(map(str, KS))
    titles = list(runs[0].course[0]["tests"])
    width = max(map(len, titles))
    head = f"{f'F@{ks}':>16} {'mAP':>5}"
    print(
        f"\nF@{ks}: a true class is among the {ks} nearest; mAP: mean average precision. In percent.\n"
        "Best: of each loss's evaluations the one with the highest mAP on this same test set, picked\n"
        "alike for every loss; it flatters all of them. The first train time has the encoding.\n\n"
        f"{'':<{width}} {'':<8}   {'at the end':^23}   {'at the best':^23}\n"
        f"{'test':<{width}} {'loss':<8} | {head} | {head} {'step':>5} {'train':>6}"
    )
    for title in titles:
        for run in runs:
            best = run.best(title)
            end, top = (_figures(at["tests"][title]) for at in (run.course[-1], best))
            print(
                f"{title:<{width}} {LABELS[run.loss]:<8} | {end} | {top} {best['step']:>5} "
                f"{run.train_seconds:>5.0f}s"
            )


def _figures(metrics: Mapping[str, float]) -> str:
    rates = "/".join(f"{100 * metrics[f'flat_hit@{k}']:.1f}" for k in KS)
    return f"{rates:>16} {100 * metrics['mean_average_precision']:>5.1f}"


def draw(
    runs: Sequence[Run],
    batch: tuple[np.ndarray, list[Image.Image], list[str]],
    examples: tuple[list[Example], dict[str, list[list[str]]]],
    path: Path,
) -> None:
    """Write one PNG: the courses, a block of one batch's OT targets, what pictures are called.

    Args:
        runs: the losses'.
        batch: (N, N) targets of a batch's image rows, its pictures and captions.
        examples: test pictures, and for each loss the names it gives each, nearest first.
        path: of the PNG.
    """
    figure = plt.figure(figsize=(14, 9.5), dpi=100, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.75, 1])
    left, right = above.subfigures(1, 2, width_ratios=[1, 1.05])
    _draw_courses(left, runs)
    _draw_targets(right, right.subplots(), *batch)
    _draw_examples(below, *examples)
    with written_whole(path) as file:
        figure.savefig(file, format="png")
    plt.close(figure)


def _draw_courses(figure: Any, runs: Sequence[Run]) -> None:
    titles = list(runs[0].course[0]["tests"])
    grid = figure.subplots(len(titles), len(METRICS), sharex=True, squeeze=False)
    for row, title in zip(grid, titles, strict=True):
        for axes, (metric, name) in zip(row, METRICS.items(), strict=True):
            for run in runs:
                steps = [at["step"] for at in run.course]
                values = [100 * at["tests"][title][metric] for at in run.course]
                colour = COLOURS[run.loss]
                axes.plot(steps, values, "o-", ms=3.5, color=colour, label=LABELS[run.loss])
            axes.set_title(f"{title}: {name}", fontsize=10)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("training steps")
    grid[0][0].legend(frameon=False, loc="lower right")
    figure.suptitle("In the course of training, one seed", fontsize=11)


def _draw_examples(
    figure: Any, examples: Sequence[Example], nearest: Mapping[str, list[list[str]]]
) -> None:
    figure.suptitle("Test pictures, and the names nearest to them at the end", fontsize=11)
    panels = figure.subfigures(1, len(examples), squeeze=False)[0]
    for i, (panel, example) in enumerate(zip(panels, examples, strict=True)):
        picture, names = panel.subplots(1, 2, width_ratios=[1, 2.4])
        picture.imshow(example.picture)
        true = textwrap.shorten(", ".join(example.names), 70, placeholder=" …")
        picture.set_title(textwrap.fill(true, 22), fontsize=8, color=RIGHT)
        picture.set_xticks([]), picture.set_yticks([])
        names.set_axis_off()
        lines = []
        for loss, called in nearest.items():
            lines.append((LABELS[loss], COLOURS[loss], "bold"))
            for name in called[i]:
                colour = RIGHT if name in example.names else "black"
                lines.append((f"  {name}", colour, "normal"))
        for place, (text, colour, weight) in enumerate(lines):
            at = 1 - (place + 0.5) / len(lines)
            text = text if len(text) <= 46 else f"{text[:45]}…"
            names.text(0, at, text, color=colour, weight=weight, fontsize=8, va="center")


def strongest_block(targets: np.ndarray, size: int) -> np.ndarray:
    """Indices of ``size`` pairs, grown greedily from the strongest match."""
    mass = targets + targets.T
    chosen = list(np.unravel_index(np.argmax(mass), mass.shape))
    while len(chosen) < size:
        gain = mass[chosen].sum(axis=0)
        gain[chosen] = -np.inf
        chosen.append(int(np.argmax(gain)))
    return np.asarray(chosen[:size])


def _draw_targets(
    figure: Any,
    axes: plt.Axes,
    targets: np.ndarray,
    images: Sequence[Image.Image],
    captions: Sequence[str],
) -> None:
    """The pairs that match each other most, pictures as rows and captions as columns."""
    chosen = strongest_block(targets, min(BLOCK, len(targets)))
    places = range(len(chosen))
    drawn = axes.imshow(targets[np.ix_(chosen, chosen)], cmap="magma_r", vmin=0)
    # A caption may hold dollars that are no formula.
    text = {"rotation_mode": "anchor", "fontsize": 7, "parse_math": False}
    words = [textwrap.shorten(captions[i], 26, placeholder="…") for i in chosen]
    axes.set_xticks(places, words, rotation=55, ha="right", **text)
    axes.set_yticks(places, [""] * len(chosen))
    axes.tick_params(length=0)
    for row, i in enumerate(chosen):
        thumbnail = images[i].convert("RGB").resize((_THUMBNAIL, _THUMBNAIL))
        picture = OffsetImage(np.asarray(thumbnail), zoom=20 / _THUMBNAIL)
        offset = {"xybox": (-14, 0), "boxcoords": "offset points", "frameon": False}
        axes.add_artist(AnnotationBbox(picture, (-0.5, row), **offset))
    axes.set_xlabel("caption in the batch")
    axes.set_ylabel("picture in the batch", labelpad=26)
    figure.colorbar(drawn, ax=axes, shrink=0.75, label="target mass (rows sum to 1 over the batch)")
    whose = f"{len(chosen)} of the batch's {len(targets)} pairs, those that match each other most"
    axes.set_title(f"OTTER's targets: {whose}", fontsize=10)
