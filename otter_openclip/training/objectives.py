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
from otter_openclip.training.watch import stop

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
    """A run's loss, with the statistics of its targets among what is logged.

    Attributes:
        loss: the module.
        scale: the log of s_d, if the loss has one.
    """

    def __init__(self, args: Namespace) -> None:
        self.loss = create_loss(args)
        self.scale: nn.Parameter | None = getattr(self.loss, "distill_logit_scale", None)
        self._args, self._advised = args, False
        self._epoch, self._calls = 0, 0
        self._terms: Mapping[str, Tensor] = {}

    def start_epoch(self, epoch: int) -> None:
        """Count from this epoch's first step; after the first epoch, say once what its targets tell."""
        self._epoch, self._calls = epoch, 0
        statistics = getattr(self.loss, "target_statistics", None)
        if statistics and not self._advised:
            self._advised = True
            if text := advice(statistics, self._args):
                logging.warning(text)

    def __call__(self, logit_scale: Tensor, **features: Any) -> dict[str, Tensor]:
        """Terms of the loss; those of a step that open_clip logs, for which it waits, are looked at."""
        terms = self.loss(logit_scale=logit_scale, **features)
        self._terms = {name: value.detach() for name, value in terms.items()}
        self._calls += 1
        step, micro_batch = divmod(self._calls, self._args.accum_freq)
        if micro_batch == 0 and (step - 1) % self._args.log_every_n_steps == 0:
            self.check()
        if not isinstance(self.loss, DistillationLoss):
            return terms
        scale = self.loss.distill_scale(logit_scale).detach()
        return LoggedLosses(terms, {"distill_scale": scale, **self.loss.target_statistics})

    def check(self) -> None:
        """End the run if the last step's loss is not finite: one NaN makes all after it NaN."""
        bad = [f"{k} is {v.item()}" for k, v in self._terms.items() if not v.isfinite()]
        if bad:
            step = (self._calls - 1) // self._args.accum_freq
            where = f"step {step} of epoch {self._epoch} (both counted from 0)"
            stop(f"the loss of {where}: {', '.join(bad)}")


def advice(statistics: Mapping[str, Tensor], args: Namespace) -> str | None:
    """What to set if the last batch's targets are nearly uniform or nearly one-hot, else None.

    ``exp(target_entropy)`` is the number of pairs over which even targets of that entropy spread.
    """
    total = args.batch_size * args.accum_freq * args.world_size
    entropy, top = (float(statistics[f"target_{name}"]) for name in ("entropy", "top_share"))
    kd = args.loss == "kd"
    flag, value = (
        ("--distill-T-t", args.distill_T_t) if kd else ("--sinkhorn-lambda", args.sinkhorn_lambda)
    )
    if math.exp(entropy) > UNIFORM_SHARE * total:
        found, change = "uniform, which is label smoothing", "larger" if kd else "smaller"
    elif top > ONE_HOT_MASS:
        found, change = "one-hot", "smaller" if kd else "larger"
    else:
        return None
    return (
        f"The targets are nearly {found}: target_entropy {entropy:.2f} nats (log {total} = "
        f"{math.log(total):.2f}), target_top_share {top:.2f}; try a {change} {flag} (now {value:g})"
    )
