"""What a training checkpoint holds: read without running its code, written whole, keys that are ours.

``state_dict_ema`` are the EMA teacher's weights, open_clip 4.x's own name; ``otter`` is the rest:
settings, the second scale with its optimizer state, the teacher's counter. Stock open_clip ignores both.
``best.pt`` also has ``zeroshot``: the metrics it was chosen by, whose they are, student or teacher,
and a fingerprint of the data.
"""

from __future__ import annotations

import argparse
import os
import re
import textwrap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from otter_openclip.files import written_whole

TEACHER = "state_dict_ema"
ENTRY = "otter"
JUDGED = "zeroshot"
JUDGED_WEIGHTS = "weights"
JUDGED_BY = "data"
_REASON = 300  # characters of torch's, which lists every key
_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and its kind; of torch.compile


def read_file(path: Path, *, verify: bool = True, mapped: bool = True) -> Mapping[str, Any]:
    """A checkpoint's contents, read without running any of its code.

    Args:
        path: of a file that ``torch.save`` wrote, or .safetensors, which has no checksums.
        verify: compare the checksums, which ``torch.load`` does not.
        mapped: leave tensors on the disk until they are used: those of the optimizer never are.

    Raises:
        ValueError: if it is damaged or no checkpoint.
    """
    try:
        if path.suffix == ".safetensors":
            contents = load_file(path)
        else:
            zipped = zipfile.is_zipfile(path)
            if zipped and verify:
                _check_checksums(path)
            mmap = mapped and zipped
            # DINO, MAE and torchvision keep their options beside their weights: plain values, and no
            # code. Here, because timm takes it off after a load of its own.
            torch.serialization.add_safe_globals([argparse.Namespace])
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # every format and kind of damage has its own
        reason = (str(error).splitlines() or [""])[0][:160]
        if refused := re.search(r"(?:GLOBAL|class) (\S+)", str(error)):
            reason = f"it holds a {refused[1]}, which is code, beside or in place of its weights"
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason}); give a file "
            "written by a training run, or a state_dict in .pt or .safetensors"
        ) from error
    if not isinstance(contents, Mapping):
        raise ValueError(
            f"{path} holds a {type(contents).__name__}, not a checkpoint or state_dict"
        )
    return contents


def write_file(path: str | os.PathLike[str], contents: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all; OSError with what the disk says if it cannot be."""
    try:
        with written_whole(path) as file:
            torch.serialization.save(contents, file)
    except RuntimeError as error:  # torch's, in the wake of the disk's
        if not isinstance(error.__context__, OSError):
            raise
        raise error.__context__ from error


def _check_checksums(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"its part {damaged} is damaged, by its checksum")


def without_wrappers(state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` under the bare module's names, whatever wrapped it when it was saved."""
    state = {str(key): value for key, value in state.items()}
    while prefix := next(
        (p for p in _WRAPPERS if state and all(k.startswith(p) for k in state)), ""
    ):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load ``state``, which must be all of the ``module``'s; what batch norms count may be missing.

    Raises:
        ValueError: torch's reason as one short line, if it does not fit.
    """
    try:
        # A plain dict has no version, so torch takes it for an old one: those had no counters.
        module.load_state_dict(dict(state))
    except (RuntimeError, TypeError) as error:
        reasons = " ".join(str(error).split("\n\t")[1:]) or str(error)
        raise ValueError(textwrap.shorten(reasons, _REASON, placeholder=" ...")) from error
