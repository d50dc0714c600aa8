"""What the targets' statistics say about a run, in words: once, after the first epoch."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping

from torch import Tensor

# Of the batch that targets spread over, and of their mass that lies on one pair.
UNIFORM_SHARE = 0.5
ONE_HOT_MASS = 0.9


def advice(statistics: Mapping[str, Tensor], args: Namespace) -> str | None:
    """What to set if the last batch's targets are nearly uniform or nearly one-hot, else None.

    ``exp(target_entropy)`` is the number of pairs over which even targets of that entropy spread.

    Args:
        statistics: a loss's ``target_statistics``; read back from the device.
        args: of the run.
    """
    if "target_entropy" not in statistics:
        return None
    total = args.batch_size * args.accum_freq * args.world_size
    entropy, top = (float(statistics[f"target_{name}"]) for name in ("entropy", "top_share"))
    figures = f"target_entropy {entropy:.2f} nats (log {total} = {math.log(total):.2f})"
    figures += f", target_top_share {top:.2f}"
    if args.loss == "otter":
        flag, value, sharper = "--sinkhorn-lambda", args.sinkhorn_lambda, "a smaller"
        blunter = "a larger"
    else:
        flag, value, sharper = "--distill-T-t", args.distill_T_t, "a larger"
        blunter = "a smaller"
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
