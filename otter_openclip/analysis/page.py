"""report.html: one file that needs nothing else, made of ``report.jinja`` beside this module."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from otter_openclip.analysis import charts
from otter_openclip.analysis.embedding import Embedded
from otter_openclip.analysis.matching import in_batches
from otter_openclip.analysis.neighbours import Duplicates
from otter_openclip.losses import DistillationLoss, OtterLoss

_EXAMPLES, _TOP = 8, 3  # pictures whose targets are listed, and captions of each
_TARGETS = {
    "infonce": "InfoNCE",
    "kd": "KD",
    "otter": "OTTER",
    "otter_keep_diag": "OTTER, pair kept",
}
_CAPTION = 280  # characters that are shown


def render(
    stats: Mapping[str, Any],
    pairs: Embedded,
    suspects: Sequence[tuple[int, int]],
    copies: Mapping[str, Duplicates],
    size: int,
) -> str:
    """The page.

    Args:
        stats: of stats.json.
        pairs: all that were looked at.
        suspects: numbers of pairs whose caption another picture fits better, and of that picture's.
        copies: duplicates among "captions" and "pictures".
        size: of the batches whose targets are shown.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "number": _number, "shortened": _shortened}

    def picture(number: int) -> str:
        return f"data:image/jpeg;base64,{base64.b64encode(pairs.thumbnails[number]).decode()}"

    return environment.get_template("report.jinja").render(
        stats=stats,
        verdict=stats["verdict"],
        pairs=pairs,
        picture=picture,
        suspects=list(zip(suspects, stats.get("suspects", []), strict=False)),
        copies=copies,
        size=size,
        targets=_TARGETS,
        examples=_examples(pairs, size),
        charts=charts,
    )


def _examples(pairs: Embedded, size: int) -> list[dict[str, Any]]:
    """Of pictures of the first batch, from the most concentrated plan to the most spread."""
    batch = in_batches(pairs.images, pairs.texts, size)[0]
    matching = DistillationLoss().targets(*batch)[0]
    plan = OtterLoss().targets(*batch)[0]
    order = plan.amax(dim=1).argsort(descending=True)
    chosen = order[torch.linspace(0, size - 1, min(_EXAMPLES, size)).long()].tolist()
    return [
        {"number": i, "lists": [("KD", _top(matching[i])), ("OTTER", _top(plan[i]))]}
        for i in chosen
    ]


def _top(row: Tensor) -> list[tuple[int, float]]:
    masses, places = row.topk(min(_TOP, len(row)))
    return list(zip(places.tolist(), masses.tolist(), strict=True))


def _percent(share: float) -> str:
    """In percent, with a digit behind the point where that says more."""
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.1%}"


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:.1e}"


def _shortened(caption: str) -> str:
    caption = " ".join(caption.split()) or "(empty)"
    return caption if len(caption) <= _CAPTION else f"{caption[: _CAPTION - 1]}…"
