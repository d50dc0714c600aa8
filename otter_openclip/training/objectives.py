"""The loss that ``--loss`` names, as open_clip's loop calls it, and what is logged of its targets."""

from __future__ import annotations

import copy
import logging
import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip import ClipLoss
from open_clip_train.distributed import is_master
from torch import Tensor, nn

from otter_openclip.losses import DistillationLoss, LabelSmoothingLoss, OtterLoss
from otter_openclip.training.watch import LossWatch

# Targets that spread over more of the batch, or have more mass on one pair, are worth a word.
UNIFORM_SHARE = 0.5
ONE_HOT_MASS = 0.9
TAG = "train/targets"
PAIRS = 1024  # at most: the targets of more would cost a step's time
SHOWN, CELL = 64, 6  # rows and columns in the picture, pixels of each
FLOOR = 1e-4  # mass that is as good as none
# From none to all of a row's mass, evenly in its logarithm.
COLOURS = np.array([(255, 255, 255), (250, 214, 137), (226, 106, 60), (120, 20, 80), (10, 0, 30)])


def create_loss(args: Namespace) -> nn.Module:
    """Build the loss of ``args.loss`` on ``args.device``; for ``clip``, open_clip's own choice."""
    if args.loss == "clip":
        return open_clip.create_loss(args)
    common = {
        "local_loss": args.local_loss,
        "gather_with_grad": args.gather_with_grad,
        "rank": args.rank,
        "world_size": args.world_size,
    }
    if args.loss == "infonce":
        return ClipLoss(cache_labels=True, **common)
    if args.loss == "ls":
        return LabelSmoothingLoss(args.label_smoothing, **common)
    common |= {
        "impl": args.loss_impl,
        "alpha": args.alpha,
        "vv_coef": args.vv_coef,
        "tt_coef": args.tt_coef,
        "share_logit_scale": args.share_logit_scale,
    }
    if args.loss == "kd":
        loss = DistillationLoss(teacher_scale=args.distill_T_t, **common)
    else:
        loss = OtterLoss(
            epsilon=args.sinkhorn_lambda,
            iterations=args.sinkhorn_iter,
            remove_diagonal=not args.keep_diag,
            ot_scope=args.ot_scope,
            **common,
        )
    if loss.distill_logit_scale is not None:
        nn.init.constant_(loss.distill_logit_scale, args.init_distill_logit_scale)
    return loss.to(args.device)


class LoggedLosses(dict):
    """Loss terms by name; ``items`` also has the scalars that are logged but not added to the loss.

    The loop of open_clip 3.x adds up ``values()`` and logs ``items()``.
    """

    def __init__(self, losses: Mapping[str, Tensor], logged: Mapping[str, Tensor]) -> None:
        super().__init__(losses)
        self.logged = logged

    def items(self) -> list[tuple[str, Tensor]]:
        """Loss terms, then logged scalars."""
        return [*super().items(), *self.logged.items()]


class Objective:
    """A run's loss, which counts its steps, logs its statistics and looks at every term.

    Attributes:
        loss: the module.
        scale: the log of s_d, if the loss has one.
        watch: what looks at the terms.
    """

    def __init__(self, args: Namespace, num_steps: int) -> None:
        """``num_steps`` is the number of optimizer steps in an epoch."""
        self.loss = create_loss(args)
        self.scale: nn.Parameter | None = getattr(self.loss, "distill_logit_scale", None)
        self.watch = LossWatch()
        self._args, self._num_steps = args, num_steps
        self._epoch = self._calls = 0
        self._advised = False
        self._pictures = TargetPictures(args) if self._wants_pictures() else None

    def _wants_pictures(self) -> bool:
        args = self._args
        somewhere = args.wandb or (args.tensorboard and args.save_logs)
        return isinstance(self.loss, DistillationLoss) and is_master(args) and bool(somewhere)

    def start_epoch(self, epoch: int) -> None:
        """Count from this epoch's first step; after the first epoch, say once what its targets tell."""
        self._epoch, self._calls = epoch, 0
        self.watch.start_epoch(epoch)
        statistics = getattr(self.loss, "target_statistics", None)
        if statistics and not self._advised:
            self._advised = True
            if text := advice(statistics, self._args):
                logging.warning(text)

    def __call__(self, logit_scale: Tensor, **features: Any) -> dict[str, Tensor]:
        """Terms of the loss, with the statistics of the targets among what is logged."""
        terms = self.loss(logit_scale=logit_scale, **features)
        step, micro_batch = divmod(self._calls, self._args.accum_freq)
        self._calls += 1
        self.watch.take(step, terms, features)
        last = micro_batch == self._args.accum_freq - 1
        if last and (step % self._args.log_every_n_steps == 0 or step + 1 == self._num_steps):
            self.watch.check()  # open_clip logs this step
            if self._pictures is not None:
                at = self._epoch * self._num_steps + step  # as the loop counts
                self._pictures.draw(self.loss, features, at)
        if not isinstance(self.loss, DistillationLoss):
            return terms
        scale = self.loss.distill_scale(logit_scale).detach()
        return LoggedLosses(terms, {"distill_scale": scale, **self.loss.target_statistics})


def advice(statistics: Mapping[str, Tensor], args: Namespace) -> str | None:
    """What to set if the last batch's targets are nearly uniform or nearly one-hot, else None.

    ``exp(target_entropy)`` is the number of pairs over which even targets of that entropy spread.

    Args:
        statistics: a loss's ``target_statistics``; read back from the device.
        args: of the run.
    """
    total = args.batch_size * args.accum_freq * args.world_size
    entropy, top = (float(statistics[f"target_{name}"]) for name in ("entropy", "top_share"))
    figures = f"target_entropy {entropy:.2f} nats (log {total} = {math.log(total):.2f})"
    figures += f", target_top_share {top:.2f}"
    sharper, blunter = (
        ("a smaller", "a larger") if args.loss == "otter" else ("a larger", "a smaller")
    )
    flag = "--sinkhorn-lambda" if args.loss == "otter" else "--distill-T-t"
    value = args.sinkhorn_lambda if args.loss == "otter" else args.distill_T_t
    if math.exp(entropy) > UNIFORM_SHARE * total:
        return (
            f"The targets are nearly uniform: {figures}. A row spreads over some "
            f"{math.exp(entropy):.0f} of {total} pairs, so that distillation is label smoothing. Try "
            f"{sharper} {flag} (now {value:g}), or towers that are pretrained: their similarities mean "
            "something from the first step"
        )
    if top > ONE_HOT_MASS:
        return (
            f"The targets are nearly one-hot: {figures}. A row has one other pair as its target; where "
            f"that is not wanted try {blunter} {flag} (now {value:g})"
        )
    return None


class TargetPictures:
    """Pictures of the targets, for TensorBoard and W&B, of steps that open_clip's loop logs."""

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._writer: Any = None

    def draw(self, loss: DistillationLoss, features: Mapping[str, Tensor], step: int) -> None:
        """Log the targets of the ``features`` that ``loss`` was called with."""
        teacher = [
            features.get(f"dist_{name}", features[name])[:PAIRS].detach()
            for name in ("image_features", "text_features")
        ]
        targets = targets_among(loss, *teacher)
        picture = draw(targets[:SHOWN, :SHOWN])
        if self._args.tensorboard and self._args.save_logs:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(self._args.tensorboard_path)
            self._writer.add_image(TAG, picture, step, dataformats="HWC")
            self._writer.flush()
        if self._args.wandb:
            import wandb

            text = f"first {min(SHOWN, len(targets))} of {len(targets)} pairs; rows pictures"
            wandb.log({TAG: wandb.Image(picture, caption=f"{text}, columns captions")}, step=step)


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
