"""What the losses send: sums of logarithms over ranks, features, and the gradient of s_d."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from otter_openclip.numerics import at_least_float32


def all_reduce_logsumexp(log_sums: Tensor, world_size: int) -> Tensor:
    """Log of the sum over ranks of ``exp(log_sums)``, (K, N), entry by entry, whatever their range.

    It moves what one all-reduce moves, as the two halves of one: each rank gets everyone's values of
    its own share of the columns, and hands the result round.
    """
    if world_size == 1:
        return log_sums
    count, columns = log_sums.shape
    shares = log_sums.view(count, world_size, columns // world_size).transpose(0, 1).contiguous()
    mine = torch.empty_like(shares)
    dist.all_to_all_single(mine, shares)
    gathered = torch.empty_like(shares)
    dist.all_gather(list(gathered), torch.logsumexp(mine, dim=0))
    return gathered.transpose(0, 1).reshape(count, columns)


def gather_rows(features: Tensor, world_size: int) -> Tensor:
    """Concatenate every rank's (B, D) into (N, D), without a gradient."""
    if world_size == 1:
        return features.detach()
    gathered = features.new_empty(world_size * len(features), *features.shape[1:])
    dist.all_gather(list(gathered.chunk(world_size)), features.detach().contiguous())
    return gathered


class GatherRows(torch.autograd.Function):
    """``gather_rows`` into full precision; the sum of all ranks' gradients comes back to a row's own."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, world_size: int) -> Tensor:
        """(B, D) to (N, D)."""
        ctx.world_size, ctx.dtype = world_size, features.dtype
        return at_least_float32(gather_rows(features, world_size))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """A reduce-scatter, spelt so that every backend has it."""
        parts = torch.empty_like(gradient)
        dist.all_to_all_single(parts, gradient.contiguous())
        total = parts.view(ctx.world_size, -1, *gradient.shape[1:]).sum(dim=0)
        return total.to(ctx.dtype), None


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor that every rank has."""
    mean = value / dist.get_world_size()
    dist.all_reduce(mean)
    return mean
