"""The loss that ``--loss`` names, as open_clip's loop calls it, and what is logged of its targets."""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import open_clip
from open_clip import ClipLoss
from torch import Tensor, nn

from otter_openclip.losses import DistillationLoss, LabelSmoothingLoss, OtterLoss
from otter_openclip.training.watch import LossWatch

# Targets that spread over more of the batch, or have more mass on one pair, are worth a word.
UNIFORM_SHARE = 0.5
ONE_HOT_MASS = 0.9


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
    if args.loss == "infonce" and args.pair_weights is None:
        return ClipLoss(cache_labels=True, **common)
    if args.loss in ("infonce", "ls"):
        smoothing = args.label_smoothing if args.loss == "ls" else 0.0
        return LabelSmoothingLoss(smoothing, **common)
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

    def __init__(self, args: Namespace) -> None:
        self.loss = create_loss(args)
        self.scale: nn.Parameter | None = getattr(self.loss, "distill_logit_scale", None)
        self.watch = LossWatch()
        self._args, self._calls, self._advised = args, 0, False

    def start_epoch(self, epoch: int) -> None:
        """Count from this epoch's first step; after the first epoch, say once what its targets tell."""
        self._calls, self.watch.epoch = 0, epoch
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
        if last and step % self._args.log_every_n_steps == 0:
            self.watch.check()  # open_clip logs this step
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
    sharper, blunter = "a smaller", "a larger"
    flag, value = "--sinkhorn-lambda", args.sinkhorn_lambda
    if args.loss == "kd":
        sharper, blunter = blunter, sharper
        flag, value = "--distill-T-t", args.distill_T_t
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
