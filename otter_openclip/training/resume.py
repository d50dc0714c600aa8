"""Where a run goes on, what its checkpoints have of the plugin, and that no other run writes there."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock
import fsspec
import torch
from open_clip_train.distributed import broadcast_object, is_master
from torch import nn

from otter_openclip.checkpoints.contents import ENTRY, TEACHER, load_weights, without_wrappers
from otter_openclip.checkpoints.newest import newest_checkpoint, read_checkpoint
from otter_openclip.teacher import EmaTeacher
from otter_openclip.training.flags import settings
from otter_openclip.training.scale import restore_scale, scale_state

_PATIENCE = 6.0  # seconds
_STATE = "teacher_state"  # the moving average's counter and what half precision loses


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
            # A second run in this process is one after the first, which has ended. Loader processes of a
            # killed run hold its lock for some seconds.
            lock = filelock.FileLock(folder / ".lock", timeout=_PATIENCE, is_singleton=True)
            try:
                lock.acquire()
                self._lock = lock
            except filelock.Timeout:
                args.log_path = None  # the folder is the other run's
                raise ValueError(
                    f"another run writes to {folder}; wait for its end, or pass another --name"
                ) from None
            except (NotImplementedError, OSError) as error:  # of network file systems without locks
                logging.warning(f"Nothing keeps other runs out of {folder}: {error}")
        if self._latest and args.remote_sync is None:
            args.resume = _latest(args)

    def end(self) -> None:
        """Let other runs write to the folder."""
        if self._lock is not None:
            self._lock.release()

    def load(self, args: Namespace, path: str, model: nn.Module) -> Mapping[str, Any]:
        """The checkpoint ``path`` under the names that ``main`` looks for.

        Raises:
            ValueError: if it does not fit ``model`` or is damaged, naming one beside it that is whole.
        """
        checkpoint = read_resumed(path, model)
        if "epoch" in checkpoint:  # weights alone can be evaluated
            self._checkpoint = {key: checkpoint.get(key) for key in (ENTRY, TEACHER)}
        return _fitted(args, checkpoint)

    def restore(
        self,
        args: Namespace,
        optimizer: torch.optim.Optimizer,
        scale: nn.Parameter | None,
        ema: EmaTeacher | None,
    ) -> None:
        """Give scale and moving average what the checkpoint had, and let go of it."""
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            return
        entry = checkpoint[ENTRY]
        if entry is None:
            logging.warning(
                "The resumed checkpoint was not written with this plugin's losses: the teacher starts "
                "as a copy of the student and the distillation scale from its initial value."
            )
            return
        tell_changes(args, entry, ema)
        if scale is not None:
            restore_scale(entry, optimizer, scale)
        if ema is not None and _STATE in entry:
            ema.module.load_state_dict(checkpoint[TEACHER])
            ema.set_extra_state(entry[_STATE])


def plugin_entries(
    args: Namespace,
    optimizer: torch.optim.Optimizer,
    scale: nn.Parameter | None,
    ema: EmaTeacher | None,
) -> dict[str, Any]:
    """What a checkpoint has beside open_clip's own keys (``checkpoints.contents``)."""
    entry: dict[str, Any] = {"settings": settings(args)}
    if scale is not None:
        entry |= scale_state(optimizer, scale)
    if ema is None:
        return {ENTRY: entry}
    return {TEACHER: ema.module.state_dict(), ENTRY: entry | {_STATE: ema.get_extra_state()}}


def tell_changes(args: Namespace, entry: Mapping[str, Any], ema: EmaTeacher | None) -> None:
    """Warn of what the run does not take from a checkpoint with this plugin's ``entry``."""
    then, now = entry["settings"], settings(args)
    changed = [
        f"{name}: {then.get(name, 'unset')} -> {now.get(name, 'unset')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if changed:
        logging.warning(f"Resuming with other settings than before: {', '.join(changed)}")
    if ema is None and _STATE in entry:
        logging.warning(
            "The resumed checkpoint's EMA ends here, this run's checkpoints have none; to keep it go on "
            f"with --loss {then['loss']} --ema-decay {then['ema_decay']}"
        )


def _latest(args: Namespace) -> str | None:
    """All ranks take the newest checkpoint that rank 0 sees.

    open_clip would start anew with ``--save-most-recent`` if there is only ``epoch_N.pt``, and
    without it take an ``epoch_latest.pt``, however old.
    """
    newest = newest_checkpoint(Path(args.checkpoint_path)) if is_master(args) else None
    path = None if newest is None else str(newest)
    return broadcast_object(args, path) if args.distributed else path


def _fitted(args: Namespace, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """``checkpoint``, of a run or weights alone, with its weights named as DDP or its absence wants."""
    state = without_wrappers(checkpoint.get("state_dict", checkpoint))
    if args.distributed:
        state = {f"module.{key}": value for key, value in state.items()}
    if "epoch" not in checkpoint:
        return state
    if args.train_data and checkpoint["epoch"] >= args.epochs and is_master(args):
        logging.warning(
            f"--resume {args.resume} has seen {checkpoint['epoch']} of --epochs {args.epochs}: nothing "
            "is left to train"
        )
    return {**checkpoint, "state_dict": state}


def read_resumed(path: str, model: nn.Module) -> Mapping[str, Any]:
    """The checkpoint to resume from, local or remote, read without running any of its code.

    Its weights are loaded into the bare ``model``, as ``main`` does; ValueError if they do not fit.
    """
    if "://" in path:
        with fsspec.open(path, "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    else:
        checkpoint = read_checkpoint(Path(path), mapped=False)
    try:
        load_weights(model, without_wrappers(checkpoint.get("state_dict", checkpoint)))
    except ValueError as error:
        raise ValueError(f"--resume {path} does not fit --model: {error}") from error
    return checkpoint
