"""Where a run goes on, and that no other run writes to its folder meanwhile."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock
import fsspec
import torch
from open_clip_train.distributed import broadcast_object, is_master
from torch import Tensor, nn

from otter_openclip.checkpoints.contents import misfits, read_file, without_wrappers
from otter_openclip.checkpoints.newest import epoch_of, newest_checkpoint, whole_before

# Taken before anything is replaced.
_stock_load_optimizer = torch.optim.Optimizer.load_state_dict


def claim_folder(args: Namespace) -> filelock.BaseFileLock | None:
    """Keep other runs out of the run's folder until what is returned is released or goes.

    Raises:
        ValueError: if one is at work there.
    """
    if not is_master(args):
        return None
    folder = Path(args.logs, args.name)
    # A later run in this process may take what an earlier one has not let go of yet.
    lock = filelock.FileLock(folder / ".lock", is_singleton=True)
    try:
        # Loader processes inherit the lock and outlive a killed run by up to 5 s.
        lock.acquire(timeout=10)
    except filelock.Timeout as error:
        raise ValueError(
            f"another run writes to {folder}; wait for its end, or pass another --name"
        ) from error
    return lock


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


def fitted(args: Namespace, loaded: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """``loaded``, the file of ``--resume``, with its weights under the names that 3.x will look for.

    Args:
        args: of the run.
        loaded: a training checkpoint, or weights alone.
        model: the bare model, its towers locked.

    Raises:
        ValueError: if its weights are another model's, or its optimizer had other parameters to train.
    """
    whole, given = "epoch" in loaded, f"--resume {args.resume}"
    state = without_wrappers(loaded.get("state_dict", loaded))
    if wrong := misfits(
        model.state_dict(), {k: v for k, v in state.items() if isinstance(v, Tensor)}
    ):
        raise ValueError(
            f"{given} does not fit --model {args.model}: {wrong}; pass the --model and --force flags it "
            "was trained with"
        )
    if args.distributed and not getattr(args, "horovod", False):
        state = {f"module.{key}": value for key, value in state.items()}
    if not whole:
        return state
    if args.train_data and "optimizer" not in loaded:
        raise ValueError(f"{given} has no optimizer's state to go on with; pass it as --pretrained")
    if args.train_data:
        saved = sum(len(group["params"]) for group in loaded["optimizer"]["param_groups"])
        own = sum(parameter.requires_grad for parameter in model.parameters())
        if saved != own:
            raise ValueError(
                f"{given}: its run trained {saved} of the model's tensors, this one would train {own}; "
                "pass the --lock flags it had, or start anew from its weights, with --pretrained in "
                "place of --resume"
            )
        if loaded["epoch"] >= args.epochs and is_master(args):
            logging.warning(
                f"{given} has seen {loaded['epoch']} of --epochs {args.epochs}: nothing is left to train"
            )
    return {**loaded, "state_dict": state}


def load_optimizer(
    args: Namespace, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """``optimizer.load_state_dict``; ValueError if ``state`` is an optimizer's of another kind."""
    try:
        _stock_load_optimizer(optimizer, state)
        lacking = sorted(optimizer.defaults.keys() - optimizer.param_groups[0].keys())
        reason = f"it has no {lacking[0]}" if lacking else ""
    except ValueError as error:
        reason = str(error)
    if reason:
        raise ValueError(
            f"--resume {args.resume}: its optimizer was another than --opt {args.opt} with these --wd "
            f"and --lock flags ({reason}); pass those it had, or start anew from its weights, with "
            "--pretrained in place of --resume"
        )


def read(path: str) -> Mapping[str, Any]:
    """The checkpoint to resume from, local or remote, read without running any of its code.

    Raises:
        ValueError: if it is damaged, naming the one before it, or no file.
    """
    if "://" not in path and not os.path.isfile(path):
        folder = Path(path, "checkpoints") if Path(path, "checkpoints").is_dir() else Path(path)
        found = newest_checkpoint(folder)
        hint = "" if found is None else f", as {found}"
        what = "is a folder; name a checkpoint in it" if folder.is_dir() else "is no file"
        raise ValueError(f"--resume {path} {what}{hint}")
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
