"""Entropic optimal transport: Sinkhorn-Knopp in the log domain.

Everything here works on the two dual potentials of a plan
``P = exp(log_kernel + row_potential + column_potential)`` and never forms ``exp(log_kernel)``, so it
is finite for any ``epsilon`` whose ``cost / epsilon`` fits the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

ColumnReduce = Callable[[Tensor], Tensor]


def column_potential(
    log_kernel: Tensor,
    iterations: int,
    *,
    rows: int | None = None,
    reduce_columns: ColumnReduce | None = None,
) -> tuple[Tensor, Tensor]:
    """Run Sinkhorn-Knopp (rows first, then columns) and return what its columns need.

    The rows may be a shard of a larger problem: then ``rows`` is the number of rows of the whole and
    ``reduce_columns`` turns the log of a shard's column sums into the log of the whole's.

    Args:
        log_kernel: (..., M, N) log of the Gibbs kernel, i.e. ``-cost / epsilon``, up to a constant.
        iterations: how often rows are scaled to ``1 / rows`` and then columns to ``1 / N``.
        rows: number of rows of the whole problem; M if None.
        reduce_columns: maps (..., N) log column sums of the shard to those of the whole problem.

    Returns:
        ``(g, f)``: log scalings of the columns (..., N) and of the rows (..., M) of a plan with total
        mass 1. Every column of that plan sums to exactly ``1 / N``. With ``iterations = 0`` both are
        zero.
    """
    rows = log_kernel.shape[-2] if rows is None else rows
    columns = log_kernel.shape[-1]
    g = log_kernel.new_zeros((*log_kernel.shape[:-2], columns))
    f = log_kernel.new_zeros(log_kernel.shape[:-1])
    for _ in range(iterations):
        f = -math.log(rows) - torch.logsumexp(log_kernel + g.unsqueeze(-2), dim=-1)
        log_column_sums = torch.logsumexp(log_kernel + f.unsqueeze(-1), dim=-2)
        if reduce_columns is not None:
            log_column_sums = reduce_columns(log_column_sums)
        g = -math.log(columns) - log_column_sums
    return g, f


def sinkhorn(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Entropic transport plan between uniform marginals (Cuturi 2013; OTTER, section 3.2).

    Starts from ``exp(-cost / epsilon)`` normalised to mass 1, then ``iterations`` times scales the rows
    to ``1 / M`` and the columns to ``1 / N``. So the columns are exact and the rows as good as the
    iterations make them.

    Args:
        cost: (..., M, N), any floating dtype; half precisions are computed in float32.
        epsilon: entropic regularisation, in the unit of ``cost``; the paper's lambda.
        iterations: number of row-and-column updates; 0 gives the normalised kernel.

    Returns:
        (..., M, N) plan of total mass 1, float32 (float64 if ``cost`` is).

    Raises:
        ValueError: if ``cost`` has fewer than 2 dimensions, ``epsilon`` is not positive or
            ``iterations`` is negative.
    """
    if cost.ndim < 2:
        raise ValueError(f"cost must be a matrix or a batch of them, got shape {tuple(cost.shape)}")
    check_sinkhorn_settings(epsilon, iterations)
    cost = cost if cost.dtype == torch.float64 else cost.float()
    log_kernel = -cost / epsilon
    g, f = column_potential(log_kernel, iterations)
    log_plan = log_kernel + f.unsqueeze(-1) + g.unsqueeze(-2)
    if iterations == 0:
        log_plan = log_plan - torch.logsumexp(log_plan, dim=(-2, -1), keepdim=True)
    return log_plan.exp()


def check_sinkhorn_settings(epsilon: float, iterations: int) -> None:
    """Raise ValueError unless ``epsilon`` is positive and finite and ``iterations`` a count."""
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon must be a positive number, got {epsilon}")
    if iterations < 0 or int(iterations) != iterations:
        raise ValueError(f"iterations must be a whole number of at least 0, got {iterations}")
