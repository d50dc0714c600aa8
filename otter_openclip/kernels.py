"""Sinkhorn's half-iterations on a GPU as one Triton kernel that never writes the kernel matrix.

For half-precision teacher features: their products run on tensor cores and are exact in float32, where
tiles (``blocks``) would be multiplied as float32. Imported only where Triton is.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from otter_openclip.collectives import all_reduce_logsumexp
from otter_openclip.sinkhorn import LOG_EMPTY, LOG_ZERO, LogPlans

_ROWS, _COLUMNS, _DEPTH = 64, 64, 32
# Triton's interpreter multiplies bfloat16 as whole numbers; widening first changes no product.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _row_logsumexp(
    first_rows,
    second_rows,
    first_columns,
    second_columns,
    biases,
    out,
    rows,
    columns,
    width,
    first_coef,
    second_coef,
    cross_coef,
    shift,
    offset,
    zero: tl.constexpr,
    remove: tl.constexpr,
    count: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    upcast: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    largest_0 = tl.full((ROWS,), zero, tl.float32)
    largest_1 = tl.full((ROWS,), zero, tl.float32)
    total_0 = tl.zeros((ROWS,), tl.float32)
    total_1 = tl.zeros((ROWS,), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        first = tl.zeros((ROWS, COLUMNS), tl.float32)
        second = tl.zeros((ROWS, COLUMNS), tl.float32)
        cross = tl.zeros((ROWS, COLUMNS), tl.float32)
        for begin in range(0, width, DEPTH):
            depth = begin + tl.arange(0, DEPTH)
            row_at = row[:, None].to(tl.int64) * width + depth[None, :]
            column_at = column[None, :].to(tl.int64) * width + depth[:, None]
            row_in = (row[:, None] < rows) & (depth[None, :] < width)
            column_in = (column[None, :] < columns) & (depth[:, None] < width)
            a = tl.load(first_rows + row_at, mask=row_in, other=0.0)
            b = tl.load(second_rows + row_at, mask=row_in, other=0.0)
            c = tl.load(first_columns + column_at, mask=column_in, other=0.0)
            d = tl.load(second_columns + column_at, mask=column_in, other=0.0)
            if upcast:
                a, b = a.to(tl.float32), b.to(tl.float32)
                c, d = c.to(tl.float32), d.to(tl.float32)
            first = tl.dot(a, c, first, input_precision="ieee")
            second = tl.dot(b, d, second, input_precision="ieee")
            cross = tl.dot(a, d, cross, input_precision="ieee")
        log_kernel = first_coef * first + second_coef * second + cross_coef * cross - shift
        if remove:
            log_kernel = tl.where(column[None, :] == row[:, None] + offset, zero, log_kernel)
        log_kernel = tl.where(column[None, :] < columns, log_kernel, zero)
        bias = tl.load(biases + column, mask=column < columns, other=0.0)
        value = log_kernel + bias[None, :]
        larger = tl.maximum(largest_0, tl.max(value, 1))
        total_0 = total_0 * tl.exp(largest_0 - larger) + tl.sum(tl.exp(value - larger[:, None]), 1)
        largest_0 = larger
        if count == 2:
            bias = tl.load(biases + columns + column, mask=column < columns, other=0.0)
            value = log_kernel + bias[None, :]
            larger = tl.maximum(largest_1, tl.max(value, 1))
            total_1 = total_1 * tl.exp(largest_1 - larger) + tl.sum(
                tl.exp(value - larger[:, None]), 1
            )
            largest_1 = larger
    tl.store(out + row, largest_0 + tl.log(total_0), mask=row < rows)
    if count == 2:
        tl.store(out + rows + row, largest_1 + tl.log(total_1), mask=row < rows)


def row_logsumexp(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    coefs: tuple[float, float, float],
    biases: Tensor,
    *,
    shift: float = 0.0,
    diagonal: int | None = None,
) -> Tensor:
    """Log-sum-exp over j of ``z_ij + bias_j`` without the matrix z, for one or two biases.

    ``z = c_0 a a'^T + c_1 b b'^T + c_2 a b'^T - shift`` with (a, b) the rows and (a', b') the columns.

    Args:
        rows: two (M, D) tensors of one dtype, contiguous.
        columns: two (N, D) tensors.
        coefs: ``c_0, c_1, c_2``.
        biases: (K, N) float32, K 1 or 2.
        shift: subtracted from every z.
        diagonal: leave out the entries ``j = i + diagonal``; None keeps them all.

    Returns:
        (K, M) float32.
    """
    (count, total), (size, width) = biases.shape, rows[0].shape
    out = biases.new_empty(count, size)
    _row_logsumexp[(triton.cdiv(size, _ROWS),)](
        *(*rows, *columns, biases, out),
        *(size, total, width),
        *(*coefs, shift, diagonal or 0),
        zero=LOG_ZERO,
        remove=diagonal is not None,
        count=count,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
        upcast=_INTERPRETED,
    )
    return out


class TritonPlans(LogPlans):
    """``LogPlans`` whose updates compute the kernel inside ``row_logsumexp``, by rows and by columns."""

    def __init__(
        self,
        *args: Any,
        rows: tuple[Tensor, Tensor],
        columns: tuple[Tensor, Tensor],
        coefs: tuple[float, float, float],
        shift: float,
        diagonal: int | None,
        **keywords: Any,
    ) -> None:
        super().__init__(*args, **keywords)
        by_columns = (coefs[1], coefs[0], coefs[2])
        self._by_rows = functools.partial(
            row_logsumexp, rows, columns, coefs, shift=shift, diagonal=diagonal
        )
        # Seen from a column, the two modalities change places and its pair lies the other way.
        self._by_columns = functools.partial(
            row_logsumexp,
            columns[::-1],
            rows[::-1],
            by_columns,
            shift=shift,
            diagonal=None if diagonal is None else -diagonal,
        )

    def solve(self, iterations: int) -> None:
        """See the base class: two launches an iteration, for both plans at once."""
        for step in range(iterations):
            biases = self.column_potential[None]
            if self.both and step:
                biases = torch.stack([self.column_potential, self._columns_own])
            potentials = -self._by_rows(biases)
            self.row_potential = potentials[0]
            if self.both:
                if step:
                    self._columns_rows = potentials[1]
                potentials = torch.stack([potentials[0], self._columns_rows])
            sums = all_reduce_logsumexp(self._by_columns(potentials), self.world_size)
            sums = -sums.clamp_min_(LOG_EMPTY)
            self.column_potential = sums[0]
            if self.both:
                self._columns_own = sums[1]


@functools.cache
def works(device: torch.device) -> bool:
    """Whether the kernel compiles on ``device`` and agrees with torch there; tried once, logged."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (
        [
            torch.randn(2, size, 64, generator=generator).to(device, torch.bfloat16)[i]
            for i in (0, 1)
        ]
        for size in (100, 130)
    )
    biases = torch.randn(2, 130, generator=generator).to(device)
    (a, b), (c, d) = ([x.float() for x in pair] for pair in (rows, columns))
    matrix = 0.1 * (a @ c.T) + 0.05 * (b @ d.T) + 0.2 * (a @ d.T)
    expected = torch.logsumexp(matrix + biases[:, None], dim=2)
    try:
        found = row_logsumexp(rows, columns, (0.1, 0.05, 0.2), biases)
        error = float((found - expected).abs().max())
    except Exception as reason:  # the compiler's, the driver's: each has its own
        logging.warning(
            f"The Triton kernel does not run on {device} ({reason}); using torch instead"
        )
        return False
    if not (math.isfinite(error) and error < 1e-3):
        logging.warning(f"The Triton kernel is off by {error:.2g} on {device}; using torch instead")
        return False
    return True
