"""Charts of the page, as SVG whose colours are the page's own, dark or light."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape

from otter_openclip.analysis.matching import DECADES

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 10, 24, 36


class _Chart:
    """Axes from (0, 0) to (1, 1), and what is drawn in them."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.parts: list[str] = []

    @staticmethod
    def at(x: float, y: float) -> str:
        across = _LEFT + x * (WIDTH - _LEFT - _RIGHT)
        return f"{across:.1f},{_TOP + (1 - y) * (HEIGHT - _TOP - _BOTTOM):.1f}"

    def text(
        self, x: float, y: float, words: str, kind: str = "", dx: int = 0, dy: int = 0
    ) -> None:
        across, down = map(float, self.at(x, y).split(","))
        self.parts.append(
            f'<text x="{across + dx:.1f}" y="{down + dy:.1f}" class="{kind}">{escape(words)}</text>'
        )

    def path(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        d = "M" + "L".join(self.at(x, y) for x, y in points)
        self.parts.append(f'<path d="{d}" class="{kind}"/>')

    def axes(
        self,
        across: Sequence[tuple[float, str]],
        up: Sequence[tuple[float, str]],
        title: str,
        upwards: str,
    ) -> None:
        for y, words in up:
            self.path([(0, y), (1, y)], "grid")
            self.text(0, y, words, "tick end", -5, 4)
        for x, words in across:
            self.text(x, 0, words, "tick mid", 0, 15)
        self.text(0.5, 0, title, "tick mid", 0, 31)
        self.text(0, 1, upwards, "tick", -_LEFT, -13)

    def svg(self) -> Markup:
        head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.label)}">'
        return Markup(head + "".join(self.parts) + "</svg>")


def _steps(values: Sequence[float]) -> list[tuple[float, float]]:
    """The outline of bars of equal width."""
    edges = np.linspace(0, 1, len(values) + 1)
    points = [(0.0, 0.0)]
    for value, left, right in zip(values, edges[:-1], edges[1:], strict=True):
        points += [(float(left), value), (float(right), value)]
    return [*points, (1.0, 0.0)]


def matchings(histogram: Mapping[str, Sequence[float]], size: int) -> Markup:
    """Probabilities on the pair and off it in a batch of ``size``, both axes logarithmic."""
    chart = _Chart(f"Histogram of matching probabilities in batches of {size}")
    top = math.ceil(math.log10(max(max(counts) for counts in histogram.values()))) or 1
    decades = range(0, top + 1, 2 if top > 4 else 1)
    up = [(d / top, f"1e{d}") for d in decades]
    across = [(1 - d / DECADES, f"1e{d}") for d in range(DECADES, 1, 2)]
    chart.axes(across, up, "probability (softmax at scale 100)", "entries a batch")
    for name, kind in (("off_diagonal", "off"), ("diagonal", "on")):
        heights = [math.log10(max(count, 1)) / top for count in histogram[name]]
        # One entry in several batches is less than one a batch: it stays visible as a sliver.
        heights = [h or (0.015 if c else 0) for h, c in zip(heights, histogram[name], strict=True)]
        chart.path(_steps(heights), f"area {kind}")
    return chart.svg()
