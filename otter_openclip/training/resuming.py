"""Where a run goes on, and that no other run writes to its folder meanwhile."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import fsspec
import torch
from open_clip_train.distributed import broadcast_object, is_master

from otter_openclip.checkpoints.folder import read_file
from otter_openclip.checkpoints.newest import epoch_of, newest_checkpoint, whole_before
from otter_openclip.files import claim


def claim_folder(args: Namespace) -> IO[Any] | None:
    """Keep other runs out of the run's folder for as long as what is returned is open.

    Raises:
        ValueError: if one is at work there.
    """
    if not is_master(args):
        return None
    folder = Path(args.logs, args.name)
    try:
        return claim(folder / ".lock")
    except FileExistsError as error:
        raise ValueError(
            f"another run ({error}) writes to {folder}; wait for its end, or pass another --name"
        ) from error


def latest(args: Namespace) -> str | None:
    """What ``--resume latest`` means: all ranks take the newest checkpoint that rank 0 sees.

    open_clip would start anew with ``--save-most-recent`` if there is only ``epoch_N.pt``, and
    without it take an ``epoch_latest.pt``, however old.
    """
    if args.remote_sync is not None or (args.resume and os.path.isdir(args.resume)):
        return args.resume
    found = newest_checkpoint(Path(args.checkpoint_path)) if is_master(args) else None
    path = None if found is None else str(found)
    return broadcast_object(args, path) if args.distributed else path


def read(path: str) -> Mapping[str, Any]:
    """The checkpoint to resume from, local or remote, read without running any of its code.

    Raises:
        ValueError: if it is damaged, naming the one before it.
    """
    if not os.path.isfile(path):
        with fsspec.open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    try:
        return read_file(Path(path), mapped=False)
    except ValueError as error:
        whole = whole_before(Path(path))
        if whole is None:
            fix = "there is no other checkpoint beside it"
        elif Path(path) == newest_checkpoint(whole.parent):
            fix = (
                f"the one before it, {whole} (epoch {epoch_of(whole)}), is whole: move the damaged file "
                "away, and --resume latest takes that one"
            )
        else:
            fix = f"{whole} (epoch {epoch_of(whole)}) is whole: --resume that"
        raise ValueError(f"--resume: {str(error).partition('; give a file')[0]}; {fix}") from error
