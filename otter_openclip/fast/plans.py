"""Sinkhorn-Knopp on one kernel matrix for the transport plans of both directions at once.

With ``K = exp(S / lambda)`` (B x N, a shard of the rows), Sinkhorn-Knopp alternates ``u = 1 / (K w)``
and ``w = 1 / (K^T u)``; the plan is ``diag(u) K diag(w)``. The image rows' plan and that of the text
rows, which is Sinkhorn-Knopp on ``K^T``, are half an iteration apart: one pass over K advances both.

    image rows' plan:  u = 1 / (K w)      then   w  <- 1 / (K^T u)
    text rows' plan:   w' = 1 / (K u')    then   u' <- 1 / (K^T w')

``_rows`` holds (u, w'), ``_columns`` (w, u'). K is never rewritten. What is local to a row needs no
communication; the column sums of both plans travel together.

``ScalingPlans`` does so on K itself, for kernels whose logarithms span at most ``2 * MAX_LOG_BOUND``;
``LogPlans`` with the logarithms of everything, for any range that fits the dtype.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from otter_openclip.fast.ranks import all_reduce_logsumexp
from otter_openclip.fast.tiles import RowTiles
from otter_openclip.numerics import sum_dtype
from otter_openclip.transport import LOG_EMPTY

# |log K| up to here: scalings then stay within exp(60) * N^2, inside float32's range.
MAX_LOG_BOUND = 30.0
# Log of "no mass": finite, so that 0 * log 0 is 0.
LOG_ZERO = -1e30
_EMPTY = 1e-33


class ScalingPlans:
    """Plans over tiles of the kernel itself, entries in [exp(-2 MAX_LOG_BOUND), 1] or 0.

    First ``solve``; then ``add`` takes every tile once, and ``finish`` ends that pass. From then on
    ``targets`` gives the plans' entries, rows of each normalised to 1.

    Attributes:
        tiles: the matrix.
        divergence: over this shard's rows, the sum of ``plan * (log plan - logits)`` of both plans.
        entropy: (B,) entropy of the image rows' targets in nats.
        top_share: (B,) their largest entries.
        masses: (B,) the image rows' plan's row masses, times their number, before rows are normalised.
    """

    def __init__(self, tiles: RowTiles, world_size: int) -> None:
        self.tiles, self.world_size = tiles, world_size
        self.divergence = tiles.like.new_zeros((), dtype=sum_dtype(tiles.like.device))
        self.entropy, self.top_share, self.masses = tiles.like.new_empty(3, tiles.rows)
        self._mass_ratio = tiles.rows * world_size / tiles.columns
        self._rows = tiles.like.new_ones(2, tiles.rows)
        self._columns = tiles.like.new_ones(2, tiles.columns)
        self._started = False  # at first w' stays 1
        self._column_sums, self._column_terms = tiles.like.new_zeros(2, tiles.columns)

    def solve(self, iterations: int) -> None:
        """Update rows, then columns, of both plans; an iteration all-reduces the columns' 2 N sums."""
        for _ in range(iterations):
            sums = torch.zeros_like(self._columns)
            for part, kernel in self.tiles:
                sums.addmm_(self._scale_rows(part, kernel), kernel)
            if self.world_size > 1:
                dist.all_reduce(sums)
            self._columns = sums.clamp_min_(_EMPTY).reciprocal_()
            self._started = True

    def _scale_rows(self, part: slice, kernel: Tensor) -> Tensor:
        scaled = torch.mm(self._columns, kernel.T).clamp_min_(_EMPTY).reciprocal_()
        count = 2 if self._started else 1  # the text rows' plan starts half an iteration later
        self._rows[:count, part] = scaled[:count]
        return self._rows[:, part]

    def add(self, part: slice, kernel: Tensor, logits: Tensor) -> None:
        """Take in the rows ``part``: their kernel and logits s_d C, (rows, N) each."""
        before = self._rows[0, part].clone()
        mine, others = self._scale_rows(part, kernel)
        torch.div(before, mine, out=self.masses[part]).mul_(self._mass_ratio)
        w = self._columns[0]
        # Of log plan = log K + log u + log w, the terms K log K and K w log w; log u is known by row.
        terms = kernel.clamp_min(_EMPTY).log_().mul_(kernel)
        known = torch.mv(kernel, torch.xlogy(w, w)).mul_(mine).add_(mine.log())
        self.entropy[part] = -(torch.mv(terms, w).mul_(mine) + known)
        terms.addcmul_(kernel, logits, value=-1)
        self.divergence += (torch.mv(terms, w).mul_(mine) + known).sum()
        sides = torch.stack([others, torch.xlogy(others, others)])
        sums, known = torch.mm(sides, kernel)
        self._column_sums += sums
        self._column_terms.add_(known).addmv_(terms.T, others)
        self.top_share[part] = torch.mul(kernel, w, out=terms).amax(dim=1).mul_(mine)

    def finish(self) -> None:
        """All ``add`` calls are done; one all-reduce of N column sums."""
        mine = self._column_sums.clone()
        if self.world_size > 1:
            dist.all_reduce(self._column_sums)
        total = self._column_sums.clamp_min_(_EMPTY)
        self.divergence += ((self._column_terms - total.log() * mine) / total).sum()
        self._columns[1] = total.reciprocal()

    def targets(self, part: slice, kernel: Tensor) -> Tensor:
        """Sum of both plans' targets for the pairs of the rows ``part``."""
        return torch.mm(self._rows[:, part].T, self._columns).mul_(kernel)


class LogPlans(ScalingPlans):
    """The same in logarithms throughout, over tiles of log K, ``LOG_ZERO`` where there is no mass."""

    def __init__(self, tiles: RowTiles, world_size: int) -> None:
        super().__init__(tiles, world_size)
        self._rows.zero_()
        self._columns.zero_()

    def solve(self, iterations: int) -> None:
        """Update rows, then columns, and once more at the end; each time with 2 N sums to send."""
        for step in range(iterations):
            self._columns = -self._update(2 if step else 1)
        before = self._rows[0].clone()
        # Now rows of both plans get mass 1.
        self._columns[1:] = -self._update(2 if iterations else 1, slice(1, 2))
        self.masses = (before - self._rows[0]).exp() * self._mass_ratio

    def _update(self, count: int, summed: slice = slice(2)) -> Tensor:
        """Update the rows of ``count`` plans; returns log column sums of the plans ``summed``."""
        sums = torch.full_like(self._columns[summed], -math.inf)
        for part, log_kernel in self.tiles:
            for i in range(count):
                self._rows[i, part] = -torch.logsumexp(log_kernel + self._columns[i], dim=1)
            for total, rows in zip(sums, self._rows[summed, part], strict=True):
                block = torch.logsumexp(log_kernel + rows[:, None], dim=0)
                torch.logaddexp(total, block, out=total)
        return all_reduce_logsumexp(sums, self.world_size).clamp_min_(LOG_EMPTY)

    def _log_plan(self, i: int, part: slice, log_kernel: Tensor) -> Tensor:
        return (log_kernel + self._rows[i, part, None]).add_(self._columns[i])

    def add(self, part: slice, kernel: Tensor, logits: Tensor) -> None:
        """Take in the rows ``part``: log K and the logits s_d C, (rows, N) each."""
        for i in range(2):
            log_plan = self._log_plan(i, part, kernel)
            plan = log_plan.exp()
            if i == 0:
                self.top_share[part] = plan.amax(dim=1)
                self.entropy[part] = -torch.linalg.vecdot(plan, log_plan)
            self.divergence += torch.linalg.vecdot(plan, log_plan.sub_(logits)).sum()

    def finish(self) -> None:
        """``solve`` has the columns' sums already."""

    def targets(self, part: slice, kernel: Tensor) -> Tensor:
        """Sum of both plans' targets for the pairs of the rows ``part``."""
        first, second = (self._log_plan(i, part, kernel).exp_() for i in range(2))
        return first.add_(second)
