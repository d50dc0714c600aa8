"""Shared by the commands' parsers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def name_nearest(message: str, known: Iterable[str]) -> str:
    """argparse's error ``message``, with the nearest ``known`` flag to each unrecognised one."""
    known = list(known)
    unknown = re.match(r"unrecognized arguments: (.*)", message)
    for word in unknown[1].split() if unknown else []:
        near = difflib.get_close_matches(word.split("=")[0], known, n=1, cutoff=0.7)
        if word.startswith("--") and near:
            message += f" (did you mean {near[0]}?)"
    return message
