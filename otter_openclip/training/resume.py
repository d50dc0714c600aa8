"""Where a run goes on, what its checkpoints have of the plugin, and that no other run writes there."""

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

from otter_openclip.checkpoints.contents import (
    ENTRY,
    TEACHER,
    misfits,
    read_file,
    without_wrappers,
)
from otter_openclip.checkpoints.newest import epoch_of, newest_checkpoint, whole_before
from otter_openclip.training.flags import settings
from otter_openclip.training.scale import restore_scale, scale_state
from otter_openclip.training.student_with_teacher import Teacher


class Resume:
    """One run's folder and, from its loading until there is an optimizer, what a checkpoint had."""

    def __init__(self, args: Namespace) -> None:
        self._latest = args.resume == "latest"  # open_clip puts a path in its place
        self._lock: filelock.FileLock | None = None
        self._checkpoint: Mapping[str, Any] | None = None

    def begin(self, args: Namespace) -> None:
        """Keep other runs out of the run's folder, and find out what ``--resume latest`` means.

        Raises:
            ValueError: if another run is at work there.
        """
        if is_master(args):
            folder = Path(args.logs, args.name)
            # A second run in this process is one after the first, which has ended.
            self._lock = filelock.FileLock(folder / ".lock", timeout=0, is_singleton=True)
            try:
                self._lock.acquire()
            except filelock.Timeout:
                raise ValueError(
                    f"another run writes to {folder}; wait for its end, or pass another --name"
                ) from None
        if self._latest and args.remote_sync is None:
            args.resume = _latest(args)

    def end(self) -> None:
        """Let other runs write to the folder."""
        if self._lock is not None:
            self._lock.release()

    def load(self, args: Namespace, path: str, model: nn.Module) -> Mapping[str, Any]:
        """The checkpoint ``path`` under the names that ``main`` looks for, in a run of ``model``.

        Raises:
            ValueError: if it is damaged, another model's, or its optimizer had other parameters.
        """
        checkpoint = read(path)
        if "epoch" in checkpoint:  # weights alone can be evaluated
            self._checkpoint = {key: checkpoint.get(key) for key in (ENTRY, TEACHER)}
        return _fitted(args, checkpoint, model)

    def restore(
        self,
        args: Namespace,
        optimizer: torch.optim.Optimizer,
        scale: nn.Parameter | None,
        teacher: Teacher | None,
    ) -> None:
        """Give scale and teacher what the checkpoint had, and let go of it.

        Raises:
            ValueError: if the optimizer's state is one of another kind of optimizer.
        """
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            return
        if lacking := optimizer.defaults.keys() - optimizer.param_groups[0].keys():
            raise ValueError(
                f"--resume {args.resume}: its optimizer had no {min(lacking)}, so it was another than "
                f"--opt {args.opt}; pass that one, or start from its weights with --pretrained"
            )
        entry = checkpoint[ENTRY]
        if entry is None:
            logging.warning(
                "The resumed checkpoint was not written with this plugin's losses: the teacher starts "
                "as a copy of the student and the distillation scale from its initial value."
            )
            return
        _tell_changes(entry["settings"], settings(args))
        if scale is not None:
            restore_scale(entry, optimizer, scale)
        if teacher is not None:
            teacher.restore(checkpoint[TEACHER], entry)


def plugin_entries(
    args: Namespace,
    optimizer: torch.optim.Optimizer,
    scale: nn.Parameter | None,
    teacher: Teacher | None,
) -> dict[str, Any]:
    """What a checkpoint has beside open_clip's own keys (``checkpoints.contents``)."""
    entry: dict[str, Any] = {"settings": settings(args)}
    if scale is not None:
        entry |= scale_state(optimizer, scale)
    if teacher is None:
        return {ENTRY: entry}
    return {**teacher.weights(), ENTRY: entry | teacher.state()}


def _tell_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [
        f"{name}: {then.get(name, 'unset')} -> {now.get(name, 'unset')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if changed:
        logging.warning(f"Resuming with other settings than before: {', '.join(changed)}")


def _latest(args: Namespace) -> str | None:
    """All ranks take the newest checkpoint that rank 0 sees.

    open_clip would start anew with ``--save-most-recent`` if there is only ``epoch_N.pt``, and
    without it take an ``epoch_latest.pt``, however old.
    """
    newest = newest_checkpoint(Path(args.checkpoint_path)) if is_master(args) else None
    path = None if newest is None else str(newest)
    return broadcast_object(args, path) if args.distributed else path


def _fitted(args: Namespace, checkpoint: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """``checkpoint``, of a run or weights alone, with its weights named as DDP or its absence wants."""
    resumed = f"--resume {args.resume}"
    state = without_wrappers(checkpoint.get("state_dict", checkpoint))
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if wrong := misfits(model.state_dict(), tensors):
        raise ValueError(
            f"{resumed} does not fit --model {args.model}: {wrong}; pass the --model and --force flags "
            "it was trained with"
        )
    if args.distributed:
        state = {f"module.{key}": value for key, value in state.items()}
    if "epoch" not in checkpoint:
        return state
    if args.train_data and "optimizer" not in checkpoint:
        raise ValueError(
            f"{resumed} has no optimizer's state to go on with; pass it as --pretrained"
        )
    if args.train_data:
        saved = sum(len(group["params"]) for group in checkpoint["optimizer"]["param_groups"])
        trained = sum(parameter.requires_grad for parameter in model.parameters())
        if saved != trained:
            raise ValueError(
                f"{resumed}: its run trained {saved} of the model's tensors, this one would train "
                f"{trained}; pass the --lock flags it had, or start from its weights with --pretrained"
            )
        if checkpoint["epoch"] >= args.epochs and is_master(args):
            logging.warning(
                f"{resumed} has seen {checkpoint['epoch']} of --epochs {args.epochs}: nothing is left "
                "to train"
            )
    return {**checkpoint, "state_dict": state}


def read(path: str) -> Mapping[str, Any]:
    """The checkpoint to resume from, local or remote, read without running any of its code.

    Raises:
        ValueError: if it is damaged, naming the one before it, or no file.
    """
    if "://" in path:
        with fsspec.open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    if not os.path.isfile(path):
        folder = Path(path, "checkpoints") if Path(path, "checkpoints").is_dir() else Path(path)
        newest = newest_checkpoint(folder)
        hint = "" if newest is None else f", as {newest}"
        what = "is a folder; name a checkpoint in it" if folder.is_dir() else "is no file"
        raise ValueError(f"--resume {path} {what}{hint}")
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
