"""What the sharded losses send: sums over ranks, plain and of logarithms, and features."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_sum_(sums: Tensor, world_size: int) -> Tensor:
    """Sum over ranks, in place: one all-reduce."""
    if world_size > 1:
        dist.all_reduce(sums)
    return sums


def all_reduce_logsumexp(log_sums: Tensor, world_size: int) -> Tensor:
    """Log of the sum over ranks of ``exp(log_sums)``, entry by entry, whatever their range.

    It moves what one all-reduce moves, as the two halves of one: each rank gets everyone's values of
    its own share of the columns, and hands the result round.

    Args:
        log_sums: (K, N), N a multiple of ``world_size``.
        world_size: number of ranks.
    """
    if world_size == 1:
        return log_sums
    count, columns = log_sums.shape
    shares = log_sums.view(count, world_size, columns // world_size).transpose(0, 1).contiguous()
    mine = torch.empty_like(shares)
    dist.all_to_all_single(mine, shares)
    total = torch.logsumexp(mine, dim=0)
    gathered = torch.empty_like(shares)
    dist.all_gather(list(gathered), total)
    return gathered.transpose(0, 1).reshape(count, columns)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, world_size: int) -> Tensor:
        ctx.world_size, ctx.dtype = world_size, features.dtype
        return full_precision(_gather(features, world_size))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # A reduce-scatter, spelt so that every backend has it.
        parts = torch.empty_like(gradient)
        dist.all_to_all_single(parts, gradient.contiguous())
        total = parts.view(ctx.world_size, -1, *gradient.shape[1:]).sum(dim=0)
        return total.to(ctx.dtype), None


def full_precision(features: Tensor) -> Tensor:
    """Half precisions as float32, float64 as it is."""
    return features if features.dtype == torch.float64 else features.float()


def _gather(features: Tensor, world_size: int) -> Tensor:
    gathered = features.new_empty(world_size * len(features), *features.shape[1:])
    dist.all_gather(list(gathered.chunk(world_size)), features.contiguous())
    return gathered


def gather_rows(features: Tensor, world_size: int, *, with_grad: bool = False) -> Tensor:
    """Concatenate every rank's (B, D) into (N, D).

    With a gradient, the result is in full precision, and the sum over ranks of what each did with a
    rank's features comes back to it.
    """
    if with_grad:
        return _GatherRows.apply(features, world_size)
    return _gather(features.detach(), world_size)
