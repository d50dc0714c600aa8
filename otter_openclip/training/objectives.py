"""The loss that ``--loss`` names, and what open_clip's loop logs of it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import open_clip
from open_clip import ClipLoss
from torch import Tensor, nn

from otter_openclip.losses import DistillationLoss, LabelSmoothingLoss, OtterLoss


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


def statistics(loss: nn.Module, logit_scale: Tensor) -> dict[str, Tensor]:
    """Scalars without gradient to log beside the terms of ``loss``'s last call; {} if it has none."""
    if not isinstance(loss, DistillationLoss):
        return {}
    scale = loss.distill_scale(logit_scale).detach()
    return {"distill_scale": scale, **loss.target_statistics}


class LoggedLosses(dict):
    """Loss terms by name; ``items`` also has the scalars that are logged but not added to the loss.

    The loop of open_clip 3.x adds up ``values()`` and logs ``items()``.
    """

    def __init__(self, losses: dict[str, Tensor], logged: dict[str, Tensor]) -> None:
        super().__init__(losses)
        self.logged = logged

    def items(self) -> list[tuple[str, Tensor]]:
        """Loss terms, then logged scalars."""
        return [*super().items(), *self.logged.items()]


def log_statistics(
    loss: nn.Module, show: Callable[[Tensor, Tensor], None] | None = None
) -> Callable[..., dict[str, Tensor]]:
    """``loss``, with its :func:`statistics` among the logged items of what it returns.

    ``show``, if given, gets the teacher's features of each call.
    """
    if not isinstance(loss, DistillationLoss):
        return loss

    def call(logit_scale: Tensor, **features: Any) -> LoggedLosses:
        losses = loss(logit_scale=logit_scale, **features)
        if show is not None:
            show(features["dist_image_features"], features["dist_text_features"])
        return LoggedLosses(losses, statistics(loss, logit_scale))

    return call
