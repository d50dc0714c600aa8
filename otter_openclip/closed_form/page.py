"""``report.html`` of a fit: what was chosen, the correlations, and the pairs that look wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from otter_openclip.closed_form.listing import Place, WrongPair
from otter_openclip.closed_form.wrong_pairs import WrongPairs
from otter_openclip.pages import address, shortened, templates, thumbnail
from otter_openclip.shards import read

_WIDTH, _HEIGHT, _EDGE = 420, 160, 22
_POINTS = 200


def page(
    record: Mapping[str, Any],
    wrong: WrongPairs | None,
    shown: Sequence[WrongPair],
    better: Sequence[Sequence[Place]],
    samples: Mapping[Place, Mapping[str, bytes]],
) -> str:
    """The page.

    Args:
        record: what fit.json says.
        wrong: the estimate of wrong pairs, if one was made.
        shown: the pairs that look most wrong.
        better: for each the places of captions that fit its picture better.
        samples: of all these places.
    """
    correlations = _chart([record["correlations"]], ["on"], "1", f"{record['embed_dim']}")
    curves = {"correlations": correlations}
    if wrong is not None:
        curves["similarities"] = similarity_chart(wrong)
    pairs = [
        {
            "place": f"{pair.place[0]}: {pair.key}",
            "weight": pair.weight,
            "image": _image(samples[pair.place]),
            "caption": _caption(samples[pair.place]),
            "better": [_caption(samples[place]) for place in places],
        }
        for pair, places in zip(shown, better, strict=True)
    ]
    template = templates(__file__).get_template("fit.jinja")
    return template.render(record=record, curves=curves, pairs=pairs)


def similarity_chart(wrong: WrongPairs) -> Markup:
    """Densities of own and others' similarities, and how likely a pair is right; an SVG."""
    own, others = (_thinned(row.cpu().numpy()) for row in wrong.histograms)
    top = max(own.max(), others.max())
    rows = [others / top, own / top, _thinned(wrong.probability.cpu().numpy(), np.mean)]
    return _chart(rows, ["off", "on", "line"], "-1", "1")


def _thinned(values: np.ndarray, how: Any = np.sum) -> np.ndarray:
    return np.array([how(part) for part in np.array_split(values, _POINTS)])


def _chart(rows: Sequence[Any], kinds: Sequence[str], first: str, last: str) -> Markup:
    """Curves of values in [0, 1]; the horizontal axis goes from ``first`` to ``last``."""
    parts = [f'<path class="axis" d="M{_EDGE},{_HEIGHT - _EDGE}H{_WIDTH - _EDGE}"/>']
    for values, kind in zip(rows, kinds, strict=True):
        across = np.linspace(_EDGE, _WIDTH - _EDGE, len(values))
        down = _HEIGHT - _EDGE - np.asarray(values) * (_HEIGHT - 2 * _EDGE)
        points = "L".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
        ends = f"L{_WIDTH - _EDGE},{_HEIGHT - _EDGE}L{_EDGE},{_HEIGHT - _EDGE}Z"
        parts.append(f'<path class="{kind}" d="M{points}{"" if kind == "line" else ends}"/>')
    for x, text, anchor in ((_EDGE, first, "start"), (_WIDTH - _EDGE, last, "end")):
        parts.append(f'<text x="{x}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{text}</text>')
    return Markup(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>')


def _image(files: Mapping[str, bytes]) -> str:
    image = read.opened(read.image_file(files, read.TRAINING_IMAGES))
    return address(thumbnail(read.rgb(image)))


def _caption(files: Mapping[str, bytes]) -> str:
    return shortened(files["txt"].decode())
