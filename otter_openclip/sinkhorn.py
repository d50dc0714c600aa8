"""Entropic optimal transport: Sinkhorn-Knopp on one kernel matrix for two plans at once.

With ``K = exp(-cost / epsilon)`` (M x N), Sinkhorn-Knopp alternates ``u = 1 / (K w)`` and
``w = 1 / (K^T u)``; the plan is ``diag(u) K diag(w)``. OTTER needs two plans whose costs are each
other's transposes: that of the rows, and that of the columns, which is Sinkhorn-Knopp on ``K^T``. Half
an iteration apart, both can be advanced in a single pass over the rows of K:

    rows' plan:     u = 1 / (K w)      then   w  <- 1 / (K^T u)
    columns' plan:  w' = 1 / (K u')    then   u' <- 1 / (K^T w')

K is read once an iteration and never rewritten. The rows may be a shard of a larger problem: what is
local to a row needs no communication, and ``K^T u`` and ``K^T w'`` travel in one all-reduce.

Two forms do the same: ``ScalingPlans`` as above, for kernels whose logarithms span at most
``2 * MAX_LOG_BOUND``; ``LogPlans`` with the logarithms of everything, for any range that fits the dtype.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from otter_openclip.blocks import RowTiles, row_blocks
from otter_openclip.collectives import all_reduce_logsumexp, all_reduce_sum_

# |log K| up to here: scalings then stay within exp(60) * N^2, inside float32's range.
MAX_LOG_BOUND = 30.0
# Log of "no mass": finite, so that 0 * log 0 is 0.
LOG_ZERO = -1e30
# A column without any mass gets a potential, or a scaling, that leaves no mass at none.
LOG_EMPTY = -1e29
_EMPTY = 1e-33


class _Plans(ABC):
    """Row plan and, with ``both``, column plan over a kernel given by tiles of rows.

    After ``solve``, ``add`` takes every block of rows once, in any order, and collects for both plans,
    whose rows are normalised to 1, the row sums of ``plan * (log plan - logits)``. Then
    ``finish(log of the columns' sums)`` makes them, and ``block`` the plans' entries, available.

    Attributes:
        entropy: (M,) entropy of the row plan's rows in nats.
        top_share: (M,) largest entry of the row plan's rows.
        row_terms: (M,) the sums of the rows' plan.
        column_terms: (N,) this shard's part of the columns' plan's sums, for its share of their mass.
        marginal_error: mean relative error of the row plan's row masses before they are normalised;
            None without iterations.
    """

    def __init__(
        self, tiles: RowTiles, like: Tensor, *, both: bool = False, world_size: int = 1
    ) -> None:
        self.tiles = tiles
        self.both = both
        self.world_size = world_size
        self._like = like
        rows, columns = tiles.rows, tiles.columns
        self.entropy = like.new_empty(rows)
        self.top_share = like.new_empty(rows)
        self.row_terms = like.new_empty(rows)
        self.column_terms = like.new_zeros(columns)
        self.marginal_error: Tensor | None = None
        self._mass_ratio = rows * world_size / columns

    @abstractmethod
    def solve(self, iterations: int) -> None:
        """Run ``iterations`` updates of rows, then columns, of both plans."""

    @abstractmethod
    def whole(self) -> Tensor:
        """The row plan, of mass 1, in place of the kernel that the tiles keep."""

    @abstractmethod
    def add(self, part: slice, kernel: Tensor, logits: Tensor) -> None:
        """Take in the rows ``part``: their kernel and logits, (rows, N) each."""

    @abstractmethod
    def log_column_sums(self) -> Tensor:
        """(N,) log of this shard's part of the column sums; all ``add`` calls are done."""

    @abstractmethod
    def finish(self, log_column_sums: Tensor | None) -> None:
        """Take the whole's column sums."""

    @abstractmethod
    def block(self, part: slice, kernel: Tensor, *, rows: bool, columns: bool) -> Tensor:
        """Entries of the row plan and/or the (transposed) column plan, summed."""


class ScalingPlans(_Plans):
    """Plans over tiles of the kernel itself, entries in [exp(-2 MAX_LOG_BOUND), 1] or 0."""

    def __init__(self, *args: object, **keywords: object) -> None:
        super().__init__(*args, **keywords)
        rows, columns = self.tiles.rows, self.tiles.columns
        self.column_scaling = self._like.new_ones(columns)  # w
        self.row_scaling: Tensor | None = None  # u
        self._columns_own: Tensor | None = None  # u'
        self._columns_rows = self._like.new_ones(rows)  # w'
        self._row_sums = self._like.new_empty(rows)  # K w
        self._column_sums = self._like.new_zeros(columns)  # K^T w'

    def solve(self, iterations: int) -> None:
        """See the base class; one all-reduce of the columns' 2 N sums an iteration."""
        rows, columns = self.tiles.rows, self.tiles.columns
        for _ in range(iterations):
            self.row_scaling = self._like.new_empty(rows)
            sums = self._like.new_zeros(1 + self.both, columns)
            for tile_part, tile in self.tiles:
                for part, own in row_blocks(tile_part, columns, tile.device):
                    kernel = tile[own]
                    row_sums = torch.mv(kernel, self.column_scaling).clamp_min_(_EMPTY)
                    scaling = torch.reciprocal(row_sums, out=self.row_scaling[part])
                    sums[0].addmv_(kernel.T, scaling)
                    if self.both:
                        sums[1].addmv_(kernel.T, self._scale_columns_plan(part, kernel))
            all_reduce_sum_(sums, self.world_size)
            sums.clamp_min_(_EMPTY).reciprocal_()
            self.column_scaling = sums[0]
            if self.both:
                self._columns_own = sums[1]

    def whole(self) -> Tensor:
        """See the base class."""
        kept = self.tiles.whole()
        if self.row_scaling is None:  # no iterations
            return kept.div_(kept.sum())
        rows = self.row_scaling / self.tiles.columns
        for part, _ in row_blocks(slice(0, len(rows)), self.tiles.columns, rows.device):
            kept[part].mul_(self.column_scaling).mul_(rows[part, None])
        return kept

    def _scale_columns_plan(self, part: slice, kernel: Tensor) -> Tensor:
        scaling = self._columns_rows[part]
        if self._columns_own is not None:
            sums = torch.mv(kernel, self._columns_own).clamp_min_(_EMPTY)
            torch.reciprocal(sums, out=scaling)
        return scaling

    def add(self, part: slice, kernel: Tensor, logits: Tensor) -> None:
        """See the base class."""
        w = self.column_scaling
        w_log_w = torch.xlogy(w, w)
        sums = torch.mv(kernel, w).clamp_min_(_EMPTY)
        self._row_sums[part] = sums
        terms = kernel.clamp_min(_EMPTY).log_().mul_(kernel)  # K log K
        known = torch.mv(kernel, w_log_w)
        self.entropy[part] = sums.log() - (torch.mv(terms, w) + known) / sums
        terms.addcmul_(kernel, logits, value=-1)
        self.row_terms[part] = (torch.mv(terms, w) + known) / sums - sums.log()
        if self.both:
            scaling = self._scale_columns_plan(part, kernel)
            self._column_sums.addmv_(kernel.T, scaling)
            self.column_terms.addmv_(terms.T, scaling)
            self.column_terms.addmv_(kernel.T, torch.xlogy(scaling, scaling))
        torch.mul(kernel, w, out=terms)
        self.top_share[part] = terms.amax(dim=1) / sums

    def log_column_sums(self) -> Tensor:
        """See the base class."""
        return self._column_sums.clamp_min(_EMPTY).log()

    def finish(self, log_column_sums: Tensor | None) -> None:
        """See the base class."""
        if self.row_scaling is not None:
            mass = self.row_scaling * self._row_sums * self._mass_ratio
            self.marginal_error = (mass - 1).abs().mean()
        if log_column_sums is not None:
            self.column_terms -= log_column_sums * self._column_sums
            self._column_sums = log_column_sums.exp()
            self.column_terms /= self._column_sums

    def block(self, part: slice, kernel: Tensor, *, rows: bool, columns: bool) -> Tensor:
        """See the base class."""
        of_rows = self._row_sums[part].reciprocal(), self.column_scaling
        if not columns:
            return torch.outer(*of_rows).mul_(kernel)
        scaling = torch.outer(self._columns_rows[part], self._column_sums.reciprocal())
        if rows:
            scaling.addr_(*of_rows)
        return scaling.mul_(kernel)


class LogPlans(_Plans):
    """Plans over tiles of the kernel's logarithm, ``LOG_ZERO`` where there is no mass."""

    def __init__(self, *args: object, **keywords: object) -> None:
        super().__init__(*args, **keywords)
        rows, columns = self.tiles.rows, self.tiles.columns
        self.column_potential = self._like.new_zeros(columns)  # log w
        self.row_potential: Tensor | None = None  # log u
        self._columns_own: Tensor | None = None  # log u'
        self._columns_rows = self._like.new_zeros(rows)  # log w'
        self._row_sums = self._like.new_empty(rows)  # log K w
        # log K^T w' is collected relative to its largest term so far, as are the columns' terms.
        self._largest = self._like.new_full((columns,), LOG_EMPTY)
        self._column_sums = self._like.new_zeros(columns)

    def solve(self, iterations: int) -> None:
        """See the base class; per iteration one exchange of the size of an all-reduce of 2 N."""
        rows, columns = self.tiles.rows, self.tiles.columns
        for _ in range(iterations):
            self.row_potential = self._like.new_empty(rows)
            sums = self._like.new_full((1 + self.both, columns), -math.inf)
            for tile_part, tile in self.tiles:
                for part, own in row_blocks(tile_part, columns, tile.device):
                    log_kernel = tile[own]
                    potential = -torch.logsumexp(log_kernel + self.column_potential, dim=1)
                    self.row_potential[part] = potential
                    potentials = [potential]
                    if self.both:
                        potentials.append(self._potential_columns_plan(part, log_kernel))
                    for total, potential in zip(sums, potentials, strict=True):
                        block = torch.logsumexp(log_kernel + potential[:, None], dim=0)
                        torch.logaddexp(total, block, out=total)
            sums = -all_reduce_logsumexp(sums, self.world_size).clamp_min_(LOG_EMPTY)
            self.column_potential = sums[0]
            if self.both:
                self._columns_own = sums[1]

    def whole(self) -> Tensor:
        """See the base class."""
        kept = self.tiles.whole()
        if self.row_potential is None:  # no iterations
            return kept.sub_(torch.logsumexp(kept, dim=(0, 1))).exp_()
        rows = self.row_potential - math.log(self.tiles.columns)
        return kept.add_(self.column_potential).add_(rows[:, None]).exp_()

    def _potential_columns_plan(self, part: slice, log_kernel: Tensor) -> Tensor:
        potential = self._columns_rows[part]
        if self._columns_own is not None:
            torch.logsumexp(log_kernel + self._columns_own, dim=1, out=potential).neg_()
        return potential

    def add(self, part: slice, kernel: Tensor, logits: Tensor) -> None:
        """See the base class."""
        log_plan = kernel + self.column_potential
        sums = torch.logsumexp(log_plan, dim=1)
        self._row_sums[part] = sums
        log_plan.sub_(sums[:, None])
        plan = log_plan.exp()
        self.entropy[part] = -(plan * log_plan).sum(dim=1)
        self.top_share[part] = plan.amax(dim=1)
        self.row_terms[part] = plan.mul_(log_plan.sub_(logits)).sum(dim=1)
        if not self.both:
            return
        log_plan = kernel + self._potential_columns_plan(part, kernel)[:, None]
        largest = torch.maximum(self._largest, log_plan.amax(dim=0))
        shrink = (self._largest - largest).exp_()
        plan = (log_plan - largest).exp_()
        # The logarithm is kept relative to the largest too: finish() knows what to subtract.
        terms = (plan * (log_plan - largest - logits)).sum(dim=0)
        moved = (self._largest - largest) * self._column_sums
        self.column_terms = (self.column_terms + moved) * shrink + terms
        self._column_sums = self._column_sums * shrink + plan.sum(dim=0)
        self._largest = largest

    def log_column_sums(self) -> Tensor:
        """See the base class."""
        return self._column_sums.log() + self._largest

    def finish(self, log_column_sums: Tensor | None) -> None:
        """See the base class."""
        if self.row_potential is not None:
            mass = (self.row_potential + self._row_sums).exp() * self._mass_ratio
            self.marginal_error = (mass - 1).abs().mean()
        if log_column_sums is not None:
            log_column_sums = log_column_sums.clamp_min(LOG_EMPTY)
            share = (self._largest - log_column_sums).exp()
            self.column_terms = share * (
                self.column_terms + (self._largest - log_column_sums) * self._column_sums
            )
            self._column_sums = log_column_sums

    def block(self, part: slice, kernel: Tensor, *, rows: bool, columns: bool) -> Tensor:
        """See the base class."""
        plan = None
        if rows:
            plan = (kernel + self.column_potential).sub_(self._row_sums[part, None]).exp_()
        if columns:
            of_columns = (kernel + self._columns_rows[part, None]).sub_(self._column_sums).exp_()
            plan = of_columns if plan is None else plan.add_(of_columns)
        return plan


@torch.no_grad()
def sinkhorn(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Entropic transport plan between uniform marginals (Cuturi 2013; OTTER, section 3.2).

    Starts from ``exp(-cost / epsilon)`` normalised to mass 1, then ``iterations`` times scales the rows
    to ``1 / M`` and the columns to ``1 / N``. So the columns are exact and the rows as good as the
    iterations make them. Costs further apart than ``2 * MAX_LOG_BOUND * epsilon`` are handled in the
    log domain; to find out, two numbers are read back from a GPU.

    Args:
        cost: (..., M, N), any floating dtype; half precisions are computed in float32.
        epsilon: entropic regularisation, in the unit of ``cost``; the paper's lambda.
        iterations: number of row-and-column updates; 0 gives the normalised kernel.

    Returns:
        (..., M, N) plan of total mass 1, float32 (float64 if ``cost`` is), without a gradient.

    Raises:
        ValueError: if ``cost`` has fewer than 2 dimensions, ``epsilon`` is not positive or
            ``iterations`` is negative.
    """
    if cost.ndim < 2:
        raise ValueError(f"cost must be a matrix or a batch of them, got shape {tuple(cost.shape)}")
    check_sinkhorn_settings(epsilon, iterations)
    cost = cost if cost.dtype == torch.float64 else cost.float()
    if cost.ndim > 2:
        plans = [sinkhorn(one, epsilon, iterations) for one in cost.flatten(0, -3)]
        return torch.stack(plans).view(cost.shape)
    low, high = torch.aminmax(cost)
    bounded = float(high - low) <= 2 * MAX_LOG_BOUND * epsilon

    def fill(whole: slice, out: Tensor) -> None:
        for part, _ in row_blocks(whole, cost.shape[1], cost.device):
            log_kernel = torch.sub(low, cost[part], out=out[part]).div_(epsilon)
            if bounded:
                log_kernel.exp_()

    tiles = RowTiles(fill, *cost.shape, cost, keep=True)
    plans = (ScalingPlans if bounded else LogPlans)(tiles, cost)
    plans.solve(iterations)
    return plans.whole()


def check_sinkhorn_settings(epsilon: float, iterations: int) -> None:
    """Raise ValueError unless ``epsilon`` is positive and finite and ``iterations`` a count."""
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon must be a positive number, got {epsilon}")
    if iterations < 0 or int(iterations) != iterations:
        raise ValueError(f"iterations must be a whole number of at least 0, got {iterations}")
