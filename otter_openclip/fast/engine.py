"""The terms of one batch and their gradient, tile by tile.

x, y are a rank's image rows and all text columns of student features, ``C = x y^T`` their cosines.
Everything about the text rows is read off the same matrix, by columns: a rank holds its rows of C and of
the teacher's kernel K only, and what a column needs from other ranks' rows (Sinkhorn's column sums, the
softmax normaliser) are N numbers that are summed over ranks. With p and q the softmaxes of C by rows and
by columns, P and Q the targets of both directions (``plans``), the gradient is

    dL/dC = a s (p + q - 2 I) / 2B  +  b s_d (p_d + q_d - P - Q) / 2B

for upstream gradients a and b of the two terms (with weights of pairs, p's rows, q's columns and I are
multiplied by them), and never stored: each tile of it is multiplied into
``dx = G y`` and ``dy += G^T x`` at once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from otter_openclip.fast import tiles
from otter_openclip.fast.plans import LOG_ZERO, MAX_LOG_BOUND, LogPlans, ScalingPlans
from otter_openclip.fast.ranks import GatherRows, all_reduce_logsumexp, gather_rows
from otter_openclip.numerics import at_least_float32, float32_math, sum_dtype

Pair = tuple[Tensor, Tensor]
_UNIT_NORM = 1.01  # up to bfloat16's rounding


def covers(loss: Any) -> bool:
    """Whether ``loss`` has one problem over all pairs, and gradients from all ranks."""
    return not loss.sharded or (loss.gather_with_grad and loss.ot_scope == "global")


def terms(
    loss: Any, student: Pair, scales: Pair, teacher: Pair, weights: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Contrastive and distillation term before alpha, and statistics of this rank's image rows.

    The mean over ranks is the batch's loss. Of the text direction a rank's value holds its own columns'
    normalisers and its rows' share of everything else. Every rank must back-propagate the same
    gradient, as in data-parallel training.

    Args:
        loss: a ``losses.DistillationLoss``; its attributes are the settings.
        student: (B, D) image and text features; of all ranks unless ``loss.sharded``.
        scales: scalars s and s_d.
        teacher: (B, D') features, likewise.
        weights: (N,) of the pairs of all ranks, for the contrastive term.
    """
    images, texts = student
    statistics: dict[str, Tensor] = {}
    with float32_math(images.device.type):
        rows = at_least_float32(images)
        s, s_d = (torch.as_tensor(scale).reshape(()) for scale in scales)  # some models have (1,)
        sharded = loss.sharded
        columns = GatherRows.apply(texts, loss.world_size) if sharded else at_least_float32(texts)
        values = _Terms.apply(rows, columns, s, s_d, loss, teacher, statistics, weights)
    return (*values, statistics)


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, s: Tensor, s_d: Tensor, *further: Any
    ) -> tuple[Tensor, ...]:
        loss, teacher, statistics, weights = further
        count, total = len(rows), len(columns)
        world_size = loss.world_size if loss.sharded else 1
        offset = loss.rank * count if loss.sharded else 0
        keep = tiles.keeps_matrices(loss.impl, 2 * count * total, rows)
        cosines = tiles.RowTiles(
            lambda part, out: torch.mm(rows[part], columns.T, out=out), (count, total), rows, keep
        )
        plans = _solved_plans(loss, teacher, offset, keep)

        row_norms, column_norms = rows.new_empty(2, count), rows.new_full((2, total), -math.inf)
        own_cosines = rows.new_empty(count)
        for (part, block), (_, kernel) in zip(cosines, plans.tiles, strict=True):
            own_cosines[part] = _own_pairs(block, part, offset)
            for i, scale in enumerate((s, s_d)):
                logits = block * scale
                row_norms[i, part] = torch.logsumexp(logits, dim=1)
                of_columns = torch.logsumexp(logits, dim=0)
                torch.logaddexp(column_norms[i], of_columns, out=column_norms[i])
            plans.add(part, kernel, logits)
        plans.finish()
        column_norms = all_reduce_logsumexp(column_norms, world_size)

        long = sum_dtype(rows.device)
        mine = slice(offset, offset + count)
        norms = row_norms.to(long) + column_norms[:, mine].to(long)
        of_pairs = norms[0] - 2 * s * own_cosines.to(long)
        contrastive = (of_pairs if weights is None else weights[mine] * of_pairs).sum()
        distillation = norms[1].sum() + plans.divergence
        statistics["target_entropy"] = plans.entropy.mean()
        statistics["target_top_share"] = plans.top_share.mean()
        if loss.iterations > 0:
            statistics["marginal_error"] = (plans.masses - 1).abs().mean()
        ctx.save_for_backward(rows, columns, s, s_d)
        ctx.state = (cosines, plans, row_norms, column_norms, offset, weights)
        return tuple((x / (2 * count)).to(rows.dtype) for x in (contrastive, distillation))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        with float32_math(upstream[0].device.type):
            return (*_gradients(ctx, upstream), None, None, None, None)


def _gradients(ctx: Any, upstream: tuple[Tensor, ...]) -> list[Tensor | None]:
    rows, columns, *scales = ctx.saved_tensors
    cosines, plans, row_norms, column_norms, offset, pair_weights = ctx.state
    weights = [x / (2 * len(rows)) for x in upstream]
    row_gradient, column_gradient = (
        torch.zeros_like(x) if needed else None  # a frozen tower's costs nothing
        for x, needed in zip((rows, columns), ctx.needs_input_grad[:2], strict=True)
    )
    scale_gradients = [rows.new_zeros((), dtype=sum_dtype(rows.device)) for _ in weights]
    buffer, begin = cosines.empty(tiles.PRODUCT_ROWS), 0
    for (part, block), (_, kernel) in zip(cosines, plans.tiles, strict=True):
        gradient = buffer[part.start - begin : part.stop - begin]
        for i, (s, weight) in enumerate(zip(scales, weights, strict=True)):
            logits = block * s
            difference = (logits - column_norms[i]).exp_()
            of_rows = logits.sub_(row_norms[i, part, None]).exp_()
            if i == 0:
                own = 1.0
                if pair_weights is not None:
                    own = pair_weights[offset + part.start : offset + part.stop]
                    difference *= pair_weights
                    of_rows *= own[:, None]
                difference += of_rows
                pairs = _own_pairs(difference, part, offset)
                pairs -= 2 * own
            else:
                difference += of_rows
                difference -= plans.targets(part, kernel)
            scale_gradients[i] += weight * torch.dot(difference.view(-1), block.reshape(-1))
            difference *= weight * s
            gradient.copy_(difference) if i == 0 else gradient.add_(difference)
        if part.stop < len(rows) and part.stop - begin + len(block) <= len(buffer):
            continue
        gradient, done, begin = buffer[: part.stop - begin], slice(begin, part.stop), part.stop
        if row_gradient is not None:
            torch.mm(gradient, columns, out=row_gradient[done])
        if column_gradient is not None:
            column_gradient.addmm_(gradient.T, rows[done])
    dtyped = [g.to(s.dtype) for g, s in zip(scale_gradients, scales, strict=True)]
    return [row_gradient, column_gradient, *dtyped]


def _solved_plans(loss: Any, teacher: Pair, offset: int, keep: bool) -> ScalingPlans:
    """The plans of both directions, over the kernel of this rank's (image, text) features."""
    world_size = loss.world_size if loss.sharded else 1
    gathered = (gather_rows(x, world_size) for x in teacher)
    images, texts, all_images, all_texts = map(at_least_float32, (*teacher, *gathered))
    coefs = tuple(loss.teacher_scale * c for c in (loss.vv_coef, loss.tt_coef, 1.0))
    count, total = len(images), len(all_images)
    # Largest |S / lambda|. Measuring norms would stall a GPU's queue: there they are taken to be 1.
    v = t = _UNIT_NORM
    if images.device.type == "cpu":
        v, t = (float(x.norm(dim=1).max()) for x in (all_images, all_texts))
    bound = coefs[0] * v * v + coefs[1] * t * t + coefs[2] * v * t
    scaling = bound <= MAX_LOG_BOUND
    removed = loss.remove_diagonal and total > 1

    def write(part: slice, out: Tensor) -> None:
        v, t = images[part], texts[part]
        torch.mm(coefs[1] * t + coefs[2] * v, all_texts.T, out=out)
        if coefs[0]:
            out.addmm_(coefs[0] * v, all_images.T)
        out -= bound  # in the log domain this keeps the large entries' digits in later sums
        if scaling:
            out.exp_()
        if removed:
            _own_pairs(out, part, offset).fill_(0.0 if scaling else LOG_ZERO)

    kernel = tiles.RowTiles(write, (count, total), images, keep)
    plans = (ScalingPlans if scaling else LogPlans)(kernel, world_size)
    plans.solve(loss.iterations)
    return plans


def _own_pairs(block: Tensor, part: slice, offset: int) -> Tensor:
    """View of the entries of ``block``, the rows ``part``, in each row's own column."""
    return block[:, offset + part.start : offset + part.stop].diagonal()
