"""Pictures of the targets, for TensorBoard and W&B, of the steps that open_clip's loop logs."""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

import numpy as np
import torch
from open_clip_train.distributed import is_master
from torch import Tensor

from otter_openclip.losses import DistillationLoss

TAG = "train/targets"
PAIRS = 1024  # at most: the targets of more would cost a step's time
SHOWN, CELL = 64, 6  # rows and columns in the picture, pixels of each
FLOOR = 1e-4  # mass that is as good as none
# From none to all of a row's mass, evenly in its logarithm.
COLOURS = np.array([(255, 255, 255), (250, 214, 137), (226, 106, 60), (120, 20, 80), (10, 0, 30)])


def wanted(loss: Any, args: Namespace) -> bool:
    """Whether this process logs a loss with targets somewhere that takes pictures."""
    somewhere = args.wandb or (args.tensorboard and args.save_logs)
    return isinstance(loss, DistillationLoss) and is_master(args) and bool(somewhere)


class TargetImages:
    """Counts the calls of the loss, and draws the targets when open_clip logs the step."""

    def __init__(self, loss: DistillationLoss, args: Namespace, steps: int) -> None:
        """``steps`` is the number of optimizer steps in an epoch."""
        self._loss, self._args, self._steps = loss, args, steps
        self._writer: Any = None
        self._epoch = self._calls = 0

    def start_epoch(self, epoch: int) -> None:
        """Count from this epoch's first step."""
        self._epoch, self._calls = epoch, 0

    def seen(self, image_features: Tensor, text_features: Tensor) -> None:
        """The teacher's (B, D') features of a call of the loss."""
        self._calls += 1
        step, micro_batch = divmod(self._calls, self._args.accum_freq)
        if micro_batch:
            return
        if (step - 1) % self._args.log_every_n_steps and step != self._steps:
            return
        targets = targets_among(self._loss, image_features[:PAIRS], text_features[:PAIRS])
        picture = draw(targets[:SHOWN, :SHOWN])
        at = self._epoch * self._steps + step - 1  # as the loop counts
        if self._args.tensorboard and self._args.save_logs:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(self._args.tensorboard_path)
            self._writer.add_image(TAG, picture, at, dataformats="HWC")
            self._writer.flush()
        if self._args.wandb:
            import wandb

            text = f"first {min(SHOWN, len(targets))} of {len(targets)} pairs; rows pictures"
            wandb.log({TAG: wandb.Image(picture, caption=f"{text}, columns captions")}, step=at)


def targets_among(loss: DistillationLoss, image_features: Tensor, text_features: Tensor) -> Tensor:
    """The image rows' targets of these (B, D') teacher features among themselves, (B, B).

    With one process, and no more pairs in the batch, these are the step's; no other rank is asked.
    """
    alone = copy.copy(loss)
    alone.rank, alone.world_size, alone.sharded = 0, 1, False
    return alone.targets(image_features, text_features)[0]


def draw(targets: Tensor) -> np.ndarray:
    """(rows, columns) of mass as (height, width, 3) 8-bit colours: white is none, black all of a row."""
    mass = torch.nan_to_num(targets.detach().float()).clamp(FLOOR, 1.0).cpu().numpy()
    share = 1 - np.log(mass) / np.log(FLOOR)
    stops = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(share, stops, COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)
