"""Entropic optimal transport between uniform marginals (Cuturi 2013): the plan of OTTER's targets.

Sinkhorn-Knopp in the log domain, where any ``epsilon`` is safe. The rows may be spread over ranks.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from otter_openclip.numerics import at_least_float32, check_count, check_interval

MIN_EPSILON = 1e-30  # costs of some millions over less leave float32's range
LOG_EMPTY = -1e29  # log of the sum of a row or column without mass: none of it stays none


@torch.no_grad()
def sinkhorn(
    cost: Tensor, epsilon: float, iterations: int, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Transport plan of total mass 1 (OTTER, section 3.2).

    Starts from ``exp(-cost / epsilon)`` normalised to mass 1, then ``iterations`` times scales the rows
    to ``1 / M`` and the columns to ``1 / N``. So the columns are exact and the rows as good as the
    iterations make them. An infinite cost gets no mass.

    Args:
        cost: (..., M, N), any floating dtype; half precisions are computed in float32. With ``group``
            the M / R rows of this rank, the same number on each.
        epsilon: entropic regularisation, in the unit of ``cost``; the paper's lambda.
        iterations: number of row-and-column updates; 0 gives the normalised kernel.
        group: process group over whose R ranks the rows are spread.

    Returns:
        The plan of the given rows, float32 (float64 if ``cost`` is), without a gradient.

    Raises:
        ValueError: naming ``cost``, ``epsilon`` or ``iterations``, if it is out of range.
    """
    if cost.ndim < 2:
        raise ValueError(f"cost must be a matrix or a batch of them, got shape {tuple(cost.shape)}")
    check_interval("epsilon", epsilon, MIN_EPSILON, math.inf)
    check_count("iterations", iterations)
    return log_sinkhorn(-at_least_float32(cost) / epsilon, iterations, group).exp()


@torch.no_grad()
def log_sinkhorn(log_plan: Tensor, iterations: int, group: dist.ProcessGroup | None) -> Tensor:
    """Log of :func:`sinkhorn`'s plan, from ``-cost / epsilon`` up to a constant."""
    rows = log_plan.shape[-2] * (1 if group is None else dist.get_world_size(group))
    log_plan = log_plan - _log_column_sums(log_plan, group).logsumexp(dim=-1, keepdim=True)
    for _ in range(iterations):
        sums = log_plan.logsumexp(dim=-1, keepdim=True).clamp_min(LOG_EMPTY)
        log_plan = log_plan - sums - math.log(rows)
        log_plan = log_plan - _log_column_sums(log_plan, group) - math.log(log_plan.shape[-1])
    return log_plan


def _log_column_sums(log_plan: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(..., 1, N) log of the sums over the rows of all ranks."""
    if group is None:
        return log_plan.logsumexp(dim=-2, keepdim=True).clamp_min(LOG_EMPTY)
    largest = log_plan.amax(dim=-2, keepdim=True).clamp_min(LOG_EMPTY)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    sums = (log_plan - largest).exp().sum(dim=-2, keepdim=True)
    dist.all_reduce(sums, group=group)
    return (sums.log() + largest).clamp_min(LOG_EMPTY)
