"""The objective of one batch and its gradient, block by block: the engine behind the losses.

Notation as in ``losses``: x, y are a rank's rows and all columns of student features, ``C = x y^T``
their cosines. Everything about the other direction is read off the same matrix, by columns: a rank
holds its rows of C and of the teacher's kernel K only, and what a column needs from other ranks' rows
(Sinkhorn's column sums, the softmax normaliser) are N numbers that are summed over ranks. With p and q
the softmaxes of C by rows and by columns, P and Q the two target plans (``sinkhorn``), the gradient is

    dL/dC = alpha     s   (p + q - 2 I) / 2B    +    (1 - alpha)  s_d  (p_d + q_d - P - Q) / 2B

and never stored: each block of it is multiplied into ``dx = G y`` and ``dy += G^T x`` at once.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from otter_openclip.blocks import RowTiles, keeps_matrices, row_blocks
from otter_openclip.collectives import all_reduce_logsumexp
from otter_openclip.sinkhorn import LOG_ZERO, MAX_LOG_BOUND, LogPlans, ScalingPlans

# open_clip's features are of unit norm up to bfloat16's rounding.
_UNIT_NORM = 1.01


@contextlib.contextmanager
def float32_math(device_type: str) -> Iterator[None]:
    """Leave autocast, and TF32 too: at a teacher scale of 100 its 1e-3 would be 10% of a target."""
    if not torch.amp.is_autocast_available(device_type):
        yield
        return
    with torch.autocast(device_type, enabled=False):
        if device_type != "cuda":
            yield
            return
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


@dataclass(frozen=True)
class TeacherFeatures:
    """A teacher's features of the rows and of all columns, and how targets are made of them.

    The similarity of row i and column j is ``own_coef own_i own_j + other_coef other_i other_j +
    own_i other_j``, ``own`` being the rows' modality. Targets are ``iterations`` of Sinkhorn on
    ``exp(similarity / epsilon)``, rows normalised; without iterations, its softmax. ``compact`` are the
    same four features in the half precision they came in, if they did.
    """

    own_rows: Tensor
    other_rows: Tensor
    own_columns: Tensor
    other_columns: Tensor
    compact: tuple[Tensor, Tensor, Tensor, Tensor] | None
    own_coef: float
    other_coef: float
    epsilon: float
    iterations: int
    remove_diagonal: bool

    def log_bound(self) -> float:
        """Upper bound of |similarity| / epsilon.

        On a CPU the features' norms are measured; elsewhere that would stall the device's queue, and
        they are taken to be 1.
        """
        own = other = _UNIT_NORM
        if self.own_columns.device.type == "cpu":
            own, other = (
                float(torch.linalg.vector_norm(columns, dim=1).max())
                for columns in (self.own_columns, self.other_columns)
            )
        return (self.own_coef * own**2 + self.other_coef * other**2 + own * other) / self.epsilon

    def similarity(self, part: slice, out: Tensor | None = None) -> Tensor:
        """``similarity / epsilon`` of the rows ``part``, into ``out``."""
        own, other = self.own_rows[part], self.other_rows[part]
        out = torch.mm(own * (self.own_coef / self.epsilon), self.own_columns.T, out=out)
        mixed = torch.add(own, other, alpha=self.other_coef).div_(self.epsilon)
        return out.addmm_(mixed, self.other_columns.T)


@dataclass(frozen=True)
class Setting:
    """One call's constants.

    Attributes:
        alpha: weight of the contrastive term; the distillation term has the rest.
        smoothing: target mass of the contrastive term spread over the N - 1 other columns.
        offset: column of row 0's own pair.
        both: take in the columns' direction as well, over the rows of all ranks.
        world_size: ranks that hold the rows; 1 if this process holds them all.
        cross_gradients: features get gradients from both directions. Otherwise each only from the
            direction in which it is a row, as with open_clip's ``--local-loss`` alone.
        implementation: "dense", "streaming" or "auto".
    """

    alpha: float = 1.0
    smoothing: float = 0.0
    offset: int = 0
    both: bool = True
    world_size: int = 1
    cross_gradients: bool = True
    implementation: str = "auto"


def objective(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    distill_scale: Tensor | None,
    teacher: TeacherFeatures | None,
    setting: Setting,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Both terms of the loss, weighted, and scalars about the targets of this rank's rows.

    The mean over ranks is the batch's loss. Of the columns' direction a rank's value holds its own
    columns' normalisers and its rows' share of everything else. Every rank must back-propagate the same
    gradient, as in data-parallel training.

    Args:
        rows: (B, D) this rank's features of one modality, unit norm, float32 or float64.
        columns: (N, D) all features of the other.
        scale: scalar s.
        distill_scale: scalar s_d; None without a teacher.
        teacher: the teacher's features in the same arrangement, or None.
        setting: the constants.

    Returns:
        Contrastive term, distillation term (None without a teacher), statistics.
    """
    statistics: dict[str, Tensor] = {}
    terms = _Objective.apply(rows, columns, scale, distill_scale, teacher, setting, statistics)
    return (*terms, statistics) if teacher is not None else (terms, None, statistics)


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        distill_scale: Tensor | None,
        teacher: TeacherFeatures | None,
        setting: Setting,
        statistics: dict[str, Tensor],
    ) -> Any:
        count, total = len(rows), len(columns)
        keep = keeps_matrices(
            setting.implementation, 1 if teacher is None else 2, count, total, rows
        )
        cosines = RowTiles(
            lambda part, out: torch.mm(rows[part], columns.T, out=out),
            *(count, total, rows),
            keep=keep,
        )
        plans = None if teacher is None else _plans(teacher, setting, keep)
        scales = [scale] if plans is None else [scale, distill_scale]

        row_norms, column_norms, own_cosines = _collect(cosines, plans, scales, setting, like=rows)

        mine = slice(setting.offset, setting.offset + count)
        norms = row_norms.double().sum(dim=1)
        if setting.both:
            norms = norms + column_norms[:, mine].double().sum(dim=1)
        on_pair, elsewhere = _smoothed(setting.smoothing, total)
        expected = (on_pair - elsewhere) * own_cosines.double().sum()
        if elsewhere:
            all_cosines = rows.double().sum(dim=0) @ columns.double().sum(dim=0)
            expected = expected + elsewhere * all_cosines
        contrastive = norms[0] - (1 + setting.both) * scale * expected
        contrastive = (contrastive * (setting.alpha / (2 * count))).to(rows.dtype)

        ctx.save_for_backward(rows, columns, scale, distill_scale)
        ctx.state = (cosines, plans, row_norms, column_norms, setting)
        if plans is None:
            return contrastive
        distillation = norms[1] + plans.row_terms.double().sum()
        if setting.both:
            distillation = distillation + plans.column_terms.double().sum()
        distillation = (distillation * ((1 - setting.alpha) / (2 * count))).to(rows.dtype)
        statistics["target_entropy"] = plans.entropy.mean()
        statistics["target_top_share"] = plans.top_share.mean()
        if plans.marginal_error is not None:
            statistics["marginal_error"] = plans.marginal_error
        return contrastive, distillation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, distill_scale = ctx.saved_tensors
        with float32_math(rows.device.type):
            gradients = _gradients(ctx, rows, columns, [scale, distill_scale], upstream)
        return (*gradients, None, None, None)


def _collect(
    cosines: RowTiles,
    plans: ScalingPlans | LogPlans | None,
    scales: list[Tensor],
    setting: Setting,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass over the blocks; the plans are finished by it.

    Returns:
        Log normalisers of the softmaxes by rows (K, B) and by columns (K, N), for the K scales, and the
        pairs' own cosines (B,).
    """
    count, total = cosines.rows, cosines.columns
    row_norms = like.new_empty(len(scales), count)
    column_norms = like.new_full((len(scales), total), -math.inf)
    own_cosines = like.new_empty(count)
    for tile_part, tile, kernel_tile in _together(cosines, plans):
        for part, own in row_blocks(tile_part, total, like.device):
            block = tile[own]
            own_cosines[part] = _own_pairs(block, part, setting.offset)
            for i, s in enumerate(scales):
                logits = block * s
                row_norms[i, part] = torch.logsumexp(logits, dim=1)
                if setting.both:
                    torch.logaddexp(
                        column_norms[i], torch.logsumexp(logits, dim=0), out=column_norms[i]
                    )
            if plans is not None:
                plans.add(part, kernel_tile[own], logits)
    if setting.both:
        sums = [column_norms] if plans is None else [column_norms, plans.log_column_sums()[None]]
        sums = all_reduce_logsumexp(torch.cat(sums), setting.world_size)
        column_norms = sums[: len(scales)]
        if plans is not None:
            plans.finish(sums[-1])
    elif plans is not None:
        plans.finish(None)
    return row_norms, column_norms, own_cosines


def _gradients(
    ctx: Any,
    rows: Tensor,
    columns: Tensor,
    scales: list[Tensor | None],
    upstream: tuple[Tensor, ...],
) -> list[Tensor | None]:
    cosines, plans, row_norms, column_norms, setting = ctx.state
    count, total = len(rows), len(columns)
    weights = [setting.alpha / (2 * count), (1 - setting.alpha) / (2 * count)]
    weights = [w * gradient for w, gradient in zip(weights, upstream, strict=False)]
    # (directions whose gradient it is, does x get it, does y get it)
    if setting.cross_gradients or not setting.both:
        passes = [(True, setting.both, True, True)]
    else:
        passes = [(True, False, True, False), (False, True, False, True)]
    on_pair, elsewhere = _smoothed(setting.smoothing, total)
    row_gradient, column_gradient = (
        torch.zeros_like(x) if needed else None  # a frozen tower's costs nothing
        for x, needed in zip((rows, columns), ctx.needs_input_grad, strict=False)
    )
    scale_gradients = [rows.new_zeros((), dtype=torch.float64) for _ in weights]
    tile_gradient = cosines.empty_tile()
    for tile_part, tile, kernel_tile in _together(cosines, plans):
        gradient = tile_gradient[: len(tile)]
        for by_rows, by_columns, to_rows, to_columns in passes:
            for part, own in row_blocks(tile_part, total, rows.device):
                block, out = tile[own], gradient[own]
                for i, weight in enumerate(weights):
                    difference = _predictions(
                        block * scales[i],
                        row_norms[i, part] if by_rows else None,
                        column_norms[i] if by_columns else None,
                    )
                    if i == 1:
                        difference -= plans.block(
                            part, kernel_tile[own], rows=by_rows, columns=by_columns
                        )
                    else:
                        if elsewhere:
                            difference -= (by_rows + by_columns) * elsewhere
                        pairs = _own_pairs(difference, part, setting.offset)
                        pairs -= (by_rows + by_columns) * (on_pair - elsewhere)
                    dot = torch.dot(difference.view(-1), block.reshape(-1))
                    scale_gradients[i] += dot * weight
                    difference.mul_(weight * scales[i])
                    out.copy_(difference) if i == 0 else out.add_(difference)
            if to_rows and row_gradient is not None:
                torch.mm(gradient, columns, out=row_gradient[tile_part])
            if to_columns and column_gradient is not None:
                column_gradient.addmm_(gradient.T, rows[tile_part])
    scale_gradients = [g.to(s.dtype) for g, s in zip(scale_gradients, scales, strict=False)]
    if plans is None:
        scale_gradients.append(None)
    return [row_gradient, column_gradient, *scale_gradients]


def _predictions(logits: Tensor, row_norms: Tensor | None, column_norms: Tensor | None) -> Tensor:
    """Softmax of ``logits`` by rows and/or by columns, summed; spends ``logits``."""
    if column_norms is None:
        return logits.sub_(row_norms[:, None]).exp_()
    by_columns = (logits - column_norms).exp_()
    return (
        by_columns if row_norms is None else by_columns.add_(_predictions(logits, row_norms, None))
    )


def _plans(teacher: TeacherFeatures, setting: Setting, keep: bool) -> ScalingPlans | LogPlans:
    """Solve the plans of both directions over the teacher's kernel."""
    count, total = len(teacher.own_rows), len(teacher.own_columns)
    bound = teacher.log_bound()
    kernels = None if keep or teacher.iterations == 0 else _kernels_for(teacher)
    scaling = bound <= MAX_LOG_BOUND and kernels is None
    removed = teacher.remove_diagonal and total > 1

    def fill(tile_part: slice, out: Tensor) -> None:
        teacher.similarity(tile_part, out)
        for _, own in row_blocks(tile_part, total, out.device):
            # In the log domain the shift keeps the large entries' digits in later sums.
            log_kernel = out[own].sub_(bound)
            if scaling:
                log_kernel.exp_()
        if removed:
            _own_pairs(out, tile_part, setting.offset).fill_(0.0 if scaling else LOG_ZERO)

    tiles = RowTiles(fill, count, total, teacher.own_rows, keep=keep)
    keywords: dict[str, Any] = {"both": setting.both, "world_size": setting.world_size}
    form = ScalingPlans if scaling else LogPlans
    if kernels is not None:
        form = kernels.TritonPlans
        keywords |= {
            "rows": teacher.compact[:2],
            "columns": teacher.compact[2:],
            "coefs": tuple(
                c / teacher.epsilon for c in (teacher.own_coef, teacher.other_coef, 1.0)
            ),
            "shift": bound,
            "diagonal": setting.offset if removed else None,
        }
    plans = form(tiles, teacher.own_rows, **keywords)
    plans.solve(teacher.iterations)
    return plans


def _kernels_for(teacher: TeacherFeatures) -> ModuleType | None:
    """The Triton kernels, for half-precision features on a GPU where they work."""
    device = teacher.own_rows.device
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if teacher.compact is None or not (device.type == "cuda" or interpreted):
        return None
    try:
        from otter_openclip import kernels
    except ImportError:  # no Triton
        return None
    return kernels if kernels.works(device) else None


def _together(
    cosines: RowTiles, plans: ScalingPlans | LogPlans | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    if plans is None:
        for part, tile in cosines:
            yield part, tile, None
    else:
        for (part, tile), (_, kernel) in zip(cosines, plans.tiles, strict=True):
            yield part, tile, kernel


def _own_pairs(block: Tensor, part: slice, offset: int) -> Tensor:
    """View of the entries of ``block``, the rows ``part``, in each row's own column."""
    return block[:, offset + part.start : offset + part.stop].diagonal()


def _smoothed(smoothing: float, total: int) -> tuple[float, float]:
    """Target mass on the pair and on each other column."""
    if total == 1:
        return 1.0, 0.0
    return 1.0 - smoothing, smoothing / (total - 1)
