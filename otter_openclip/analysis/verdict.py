"""What the figures say in plain words: are the captions noisy, would OTTER help, how sure is that.

Says nothing that was not measured here, but for ``EVIDENCE``: what docs/evidence.md found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

# Shares of wrong captions, and what that is called.
CLEAN, NOISY = 0.08, 0.25
FEW = 1000  # pairs looked at
BY_HEART = 0.7  # captions whose own picture is the first of all: more than models know of new ones

# OTTER against a tuned InfoNCE, COCO and Flickr8k: pairs -> outcome at no, some and much noise.
EVIDENCE = {
    1500: ("ahead", "slightly ahead", "ahead"),
    3000: ("level", "level", "ahead"),
    6000: ("behind", "behind", "level"),
}
_REACH = 2.0  # factor beyond the evidence's pairs up to which it is applied
_OTTER = {
    "ahead": ("Probably", "was ahead of InfoNCE"),
    "slightly ahead": ("Perhaps a little", "was slightly ahead of InfoNCE"),
    "level": ("Hardly", "was about level with InfoNCE"),
    "behind": ("Probably not", "was behind InfoNCE trained for as long"),
}
_WRONG = ("hardly any wrong captions", "some wrong captions", "many wrong captions")


class Verdict(NamedTuple):
    """Each a short answer and a sentence; and remarks on how sure they are."""

    noise: tuple[str, str]
    otter: tuple[str, str]
    sureness: str
    remarks: list[str]


def verdict(stats: Mapping[str, Any]) -> Verdict:
    """From the other entries of stats.json."""
    wrong, data = stats["wrong"], stats["data"]
    if "fault" in wrong:
        otter = ("Cannot be told", "That depends on the captions.")
        return Verdict(("Cannot be told", f"{wrong['fault']}."), otter, "not sure at all", [])
    remarks, few = [], data["pairs"] < FEW
    if few:
        remarks.append(f"Only {data['pairs']:,} pairs were looked at.")
    by_heart = wrong["own_is_nearest"] > BY_HEART and not few
    if by_heart:
        remarks.append(
            "The model may know these very pairs by heart, or the captions are very varied: "
            f"{wrong['own_is_nearest']:.0%} have their own picture first among {data['pairs']:,}."
        )
    remarks += [
        "A model that was trained on these very pairs finds much less noise than there is, or none: use "
        "one that has not seen them.",
        "What is known of OTTER is from photos and two frozen pretrained towers, all losses tuned "
        "alike. otter-openclip compare measures it on these pairs.",
    ]
    share, error = wrong["share"], wrong["standard_error"]
    level = 0 if share < CLEAN else 1 if share < NOISY else 2
    answer = ("Hardly", "Some of them", "Yes, many")[level]
    noise = (
        f"{answer}, if new to the model" if by_heart else answer,
        f"About {share:.0%} (± {2 * error:.0%}) of the captions fit their own picture no better than "
        "that of another. Wrong captions are about that many; what the model does not know counts "
        "as well.",
    )
    sureness = "not very sure" if by_heart or few else "fairly sure"
    return Verdict(noise, _otter(level, data["pairs_in_all"]), sureness, remarks)


def _otter(level: int, total: int | None) -> tuple[str, str]:
    if total is None:
        return (
            "It depends",
            f"With {_WRONG[level]}, OTTER helped where pairs were few. How many there are here is not "
            "known: there is no sizes.json beside the shards.",
        )
    near = min(EVIDENCE, key=lambda count: abs(math.log(count / max(total, 1))))
    short, outcome = _OTTER[EVIDENCE[near][level]]
    case = f"{near:,} pairs of photos with {_WRONG[level]}"
    if total > _REACH * max(EVIDENCE) or total < min(EVIDENCE) / _REACH:
        more = "more" if total > near else "fewer"
        return (
            "Not known",
            f"{total:,} pairs are {more} than our evidence covers. Its nearest case is {case}: there "
            f"OTTER {outcome}. Try both losses on a part.",
        )
    return (
        short,
        f"The nearest case to your {total:,} in our evidence is {case}: there OTTER {outcome}.",
    )
