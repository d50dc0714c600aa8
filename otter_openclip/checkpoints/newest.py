"""Which of a run's checkpoints is the newest, and which is left if that one is damaged."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from otter_openclip.checkpoints.contents import read_file

LATEST = "epoch_latest.pt"


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the last epoch: of ``epoch_N.pt`` the highest, or ``epoch_latest.pt``.

    open_clip takes an ``epoch_latest.pt`` that a run left which was resumed without
    ``--save-most-recent``. One that cannot be read counts as the newest: whoever reads it will say so.
    """
    numbered = _numbered(folder)
    latest = folder / LATEST
    if latest.is_file() and (not numbered or epoch_of(latest) >= _number(numbered[-1])):
        return latest
    return numbered[-1] if numbered else None


def whole_before(path: Path) -> Path | None:
    """The newest checkpoint beside ``path`` that can be read, if any."""
    checkpoints = {*_numbered(path.parent), path.parent / LATEST} - {path}
    for checkpoint in sorted(filter(Path.is_file, checkpoints), key=epoch_of, reverse=True):
        with contextlib.suppress(ValueError):
            read_file(checkpoint)
            return checkpoint
    return None


def read_checkpoint(path: Path, *, mapped: bool = True) -> Mapping[str, Any]:
    """``read_file``, whose error also names the newest checkpoint beside ``path`` that is whole."""
    try:
        return read_file(path, mapped=mapped)
    except ValueError as error:
        whole = whole_before(path)
        beside = f"; beside it {whole} (epoch {epoch_of(whole)}) is whole" if whole else ""
        raise ValueError(f"{error}{beside}") from error


def epoch_of(path: Path) -> float:
    """The number of epochs that a checkpoint has seen; infinity if it cannot be read."""
    try:
        return read_file(path, verify=False).get("epoch", 0)
    except ValueError:
        return math.inf


def _numbered(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.glob("epoch_*.pt") if re.fullmatch(r"epoch_\d+", path.stem)),
        key=_number,
    )


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("epoch_"))
