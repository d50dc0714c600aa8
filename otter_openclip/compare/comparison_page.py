"""``report.html`` of a comparison and of the demo: table, course, pictures and what they are called."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from otter_openclip.compare.trial import METRICS, label

PICTURES = 12
_THUMBNAIL = 160
_WIDTH, _HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 12, 12, 30


class Panel(NamedTuple):
    """Methods that were given the same pairs; ``rows`` as of ``figures.table``."""

    title: str
    rows: Sequence[Mapping[str, Any]]
    verdict: str


def page(
    title: str,
    text: str,
    panels: Sequence[Panel],
    shown: Sequence[tuple[Image.Image, list[int]]],
    names: Mapping[str, list[list[str]]],
    record: Mapping[str, Any],
    classes: Sequence[str],
    wrong: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page.

    Args:
        title: its heading.
        text: what was done.
        panels: of pairs.
        shown: test pictures with the numbers of their classes.
        names: by method what each is called.
        record: may have ``importance`` and ``failed`` by method.
        classes: all names.
        wrong: pairs that look wrong: ``picture``, ``caption`` and ``weight``.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"image": thumbnail, "label": label}
    methods = list(dict.fromkeys(row["method"] for panel in panels for row in panel.rows))
    kinds = {method: f"m{number % 6}" for number, method in enumerate(sorted(methods))}
    return environment.get_template("compare.jinja").render(
        title=title,
        text=text,
        panels=[(panel, chart(panel.rows, kinds)) for panel in panels],
        metrics=list(METRICS),
        kinds=kinds,
        pictures=[
            (picture, {classes[c] for c in true}, {m: called[n] for m, called in names.items()})
            for n, (picture, true) in enumerate(shown)
        ],
        record=record,
        wrong=wrong,
    )


def chart(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> Markup:
    """mAP against steps, an SVG; what has no course, the closed form, is a level line."""
    values = [value for row in rows for _, value in row["course"]]
    low, high = 10 * int(min(values) // 10), 10 * int(max(values) // 10 + 1)
    most = max(steps for row in rows for steps, _ in row["course"])

    def at(steps: float, value: float) -> str:
        across = _LEFT + steps / most * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = []
    for value in range(low, high + 1, 10 if high - low > 30 else 5):
        x, y = at(0, value).split(",")
        parts.append(f'<path class="axis" d="M{x},{y}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{float(y) + 4}" text-anchor="end">{value}</text>')
    for steps in sorted({row["course"][-1][0] for row in rows} - {1}):
        parts.append(
            f'<text x="{at(steps, low).split(",")[0]}" y="{_HEIGHT - 12}" text-anchor="middle">'
            f"{steps}</text>"
        )
    for row in rows:
        course = row["course"]
        if len(course) == 1:
            course = [(0, course[0][1]), (most, course[0][1])]
        points = "L".join(at(*point) for point in course)
        name = escape(row["label"])
        parts.append(
            f'<path class="course {kinds[row["method"]]}" d="M{points}"><title>{name}</title></path>'
        )
    label_text = "mean average precision against training steps"
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label_text}">'
        f"{''.join(parts)}</svg>"
    )


def thumbnail(picture: Image.Image) -> str:
    """A small picture as a data address."""
    picture = picture.convert("RGB")
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    picture.save(content := io.BytesIO(), "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
