"""Sinkhorn's half-iterations on a GPU as one Triton kernel that never writes the kernel matrix.

For half-precision teacher features: their products run on tensor cores and are exact in float32, where
tiles would be multiplied as float32. Imported only where Triton is.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from otter_openclip.fast.plans import LOG_ZERO, LogPlans
from otter_openclip.fast.ranks import all_reduce_logsumexp
from otter_openclip.fast.tiles import RowTiles
from otter_openclip.sinkhorn import LOG_EMPTY

_ROWS, _COLUMNS, _DEPTH = 64, 64, 32
# Triton's interpreter multiplies bfloat16 as whole numbers; widening first changes no product.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _row_logsumexp(
    first_rows, second_rows, first_columns, second_columns, biases, out,
    rows, columns, width, first_coef, second_coef, cross_coef, shift, offset,
    zero: tl.constexpr, remove: tl.constexpr, upcast: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
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

        value = log_kernel + tl.load(biases + column, mask=column < columns, other=0.0)[None, :]
        larger = tl.maximum(largest_0, tl.max(value, 1))
        total_0 = total_0 * tl.exp(largest_0 - larger) + tl.sum(tl.exp(value - larger[:, None]), 1)
        largest_0 = larger
        bias = tl.load(biases + columns + column, mask=column < columns, other=0.0)
        value = log_kernel + bias[None, :]
        larger = tl.maximum(largest_1, tl.max(value, 1))
        total_1 = total_1 * tl.exp(largest_1 - larger) + tl.sum(tl.exp(value - larger[:, None]), 1)
        largest_1 = larger
    tl.store(out + row, largest_0 + tl.log(total_0), mask=row < rows)
    tl.store(out + rows + row, largest_1 + tl.log(total_1), mask=row < rows)


def row_logsumexp(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    coefs: Sequence[float],
    biases: Tensor,
    *,
    shift: float = 0.0,
    diagonal: int | None = None,
) -> Tensor:
    """Log-sum-exp over j of ``z_ij + bias_j`` without the matrix z, for two biases.

    ``z = c_0 a a'^T + c_1 b b'^T + c_2 a b'^T - shift`` with (a, b) the rows and (a', b') the columns.

    They are two (M, D) and two (N, D) contiguous tensors of one dtype, biases (2, N) float32. With
    ``diagonal`` the entries ``j = i + diagonal`` are left out. Returns (2, M) float32.
    """
    (size, width), total = rows[0].shape, len(columns[0])
    out = biases.new_empty(2, size)
    sizes = (size, total, width)
    _row_logsumexp[(triton.cdiv(size, _ROWS),)](
        *(*rows, *columns, biases, out, *sizes, *coefs, shift, diagonal or 0),
        **{"zero": LOG_ZERO, "remove": diagonal is not None, "upcast": _INTERPRETED},
        **{"ROWS": _ROWS, "COLUMNS": _COLUMNS, "DEPTH": _DEPTH},
    )
    return out


class TritonPlans(LogPlans):
    """``LogPlans`` whose updates compute the kernel inside ``row_logsumexp``, by rows and by columns."""

    def __init__(
        self,
        tiles: RowTiles,
        world_size: int,
        features: Sequence[Tensor],
        coefs: Sequence[float],
        shift: float,
        diagonal: int | None,
    ) -> None:
        """``features`` are those of ``tiles``: image and text rows, then columns; the rest likewise."""
        super().__init__(tiles, world_size)
        rows, columns = features[:2], features[2:]
        # Seen from a column, the two modalities change places and its pair lies the other way.
        turned, back = (coefs[1], coefs[0], coefs[2]), None if diagonal is None else -diagonal
        self._by_rows = functools.partial(
            row_logsumexp, rows, columns, coefs, shift=shift, diagonal=diagonal
        )
        self._by_columns = functools.partial(
            row_logsumexp, columns[::-1], rows[::-1], turned, shift=shift, diagonal=back
        )

    def _update(self, count: int, summed: slice = slice(2)) -> Tensor:
        self._rows[:count] = -self._by_rows(self._columns)[:count]
        sums = all_reduce_logsumexp(self._by_columns(self._rows)[summed], self.world_size)
        return sums.clamp_min_(LOG_EMPTY)


@functools.cache
def works(device: torch.device) -> bool:
    """Whether the kernel compiles on ``device`` and agrees with torch there; tried once, logged."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(n, 64, generator=generator) for n in (100, 100, 130, 130)]
    a, b, c, d = given = [x.to(device, torch.bfloat16) for x in features]
    biases = torch.randn(2, 130, generator=generator).to(device)
    a, b, c, d = (x.float() for x in given)
    expected = 0.1 * (a @ c.T) + 0.05 * (b @ d.T) + 0.2 * (a @ d.T)
    expected = torch.logsumexp(expected + biases[:, None], dim=2)
    try:
        found = row_logsumexp(given[:2], given[2:], (0.1, 0.05, 0.2), biases)
        error = float((found - expected).abs().max())
        problem = "" if error < 1e-3 else f"is off by {error:.2g}"
    except Exception as reason:  # the compiler's, the driver's: each has its own
        problem = f"does not run ({reason})"
    if problem:
        logging.warning(f"The Triton kernel {problem} on {device}; using torch instead")
    return not problem
