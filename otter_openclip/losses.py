"""The paper's objectives, written plainly: label smoothing, knowledge distillation and OTTER.

This file, with ``transport`` and ``teacher``, is the method: ``impl="plain"`` runs what is written here,
and what ``fast`` computes for less is tested against it. InfoNCE is ``open_clip.ClipLoss`` itself.

Notation: B pairs on each of R ranks, N = R * B, width D; v, t are the student's unit-norm image and text
features, v~, t~ the teacher's, s and s_d two learned scales. Image rows match texts, text rows images; a
loss is the mean of the two directions, where the reference has their sum: its losses and gradients are
twice these. Everything is computed in float32 whatever the autocast dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip import ClipLoss
from open_clip.loss import gather_features
from torch import Tensor, nn

from otter_openclip import fast
from otter_openclip.fast.ranks import gather_rows, mean_over_ranks
from otter_openclip.numerics import (
    at_least_float32,
    check_choice,
    check_count,
    check_features,
    check_interval,
    float32_math,
)
from otter_openclip.transport import log_sinkhorn

INITIAL_LOG_SCALE = 3.9
MAX_LOG_SCALE = math.log(100.0)
MIN_LAMBDA, MAX_COEF = 1e-3, 1e6  # a similarity is known to 1e-7 in float32
OT_SCOPES = ("global", "local")
IMPLEMENTATIONS = ("auto", "dense", "streaming", "plain")

Pair = tuple[Tensor, Tensor]


class _PairLoss(ClipLoss):
    """Rows and columns as open_clip's flags ask: with ``local_loss`` a rank's own B rows, else all."""

    def __init__(self, impl: str, clip_loss: dict[str, Any]) -> None:
        super().__init__(**clip_loss)
        self.impl = check_choice("impl", impl, IMPLEMENTATIONS)
        self.sharded = self.local_loss and self.world_size > 1

    def _all_ranks(self, images: Tensor, texts: Tensor, *, student: bool) -> Pair:
        """All ranks' features; the student's have gradients as open_clip's flags say, others none."""
        if self.world_size == 1:
            return images, texts
        flags = (self.local_loss, self.gather_with_grad) if student else (True, False)
        images, texts = images.contiguous(), texts.contiguous()
        return gather_features(images, texts, *flags, self.rank, self.world_size)

    def _rows_and_columns(self, images: Tensor, texts: Tensor, *, student: bool) -> Any:
        """Image rows, text rows, image columns, text columns."""
        rows = at_least_float32(images), at_least_float32(texts)
        columns = self._all_ranks(*rows, student=student)
        return *(rows if self.sharded else columns), *columns

    def _cosines(self, images: Tensor, texts: Tensor) -> Pair:
        """v t^T and t v^T, (rows, N) each."""
        v, t, all_v, all_t = self._rows_and_columns(images, texts, student=True)
        return v @ all_t.T, t @ all_v.T

    def _own_pairs(self, matrix: Tensor) -> Pair:
        """Index of each row's own pair in a (rows, N) matrix."""
        row = torch.arange(len(matrix), device=matrix.device)
        return row, row + (self.rank * len(matrix) if self.sharded else 0)

    def _all_ranks_weights(self, weights: Tensor | None) -> Tensor | None:
        """All ranks' ``pair_weights``, (N,)."""
        if weights is None:
            return None
        return gather_rows(at_least_float32(weights), self.world_size)

    def _contrastive(
        self,
        directions: Pair,
        scale: Tensor,
        weights: Tensor | None,
        smoothing: float = 0.0,
    ) -> Tensor:
        """Cross entropy of softmax(s C) by rows, the target 1 - smoothing on the pair.

        With ``weights`` (N,) of the pairs each row's is multiplied by its pair's.
        """
        halves = []
        for cosines in directions:
            log_predicted = (scale * cosines).log_softmax(dim=1)
            on_pair = log_predicted[self._own_pairs(cosines)]
            elsewhere = (log_predicted.sum(dim=1) - on_pair) / max(cosines.shape[1] - 1, 1)
            of_rows = (1 - smoothing) * on_pair + smoothing * elsewhere
            if weights is not None:
                of_rows = weights[self._own_pairs(cosines)[1]] * of_rows
            halves.append(of_rows.mean() / -2)
        return halves[0] + halves[1]


class LabelSmoothingLoss(_PairLoss):
    """InfoNCE with the target 1 - smoothing on the pair, smoothing / (N - 1) elsewhere (section 4.1)."""

    def __init__(self, smoothing: float, *, impl: str = "auto", **clip_loss: Any) -> None:
        """Set up the loss; raises ValueError if ``smoothing`` is outside [0, 1].

        ``impl`` is as of the other losses, but this one is plain whatever it says; ``clip_loss`` are
        ``open_clip.ClipLoss``'s keywords: local_loss, gather_with_grad, rank, world_size.
        """
        super().__init__(impl, clip_loss)
        self.smoothing = check_interval("smoothing", smoothing, 0.0, 1.0)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor | None = None,
        dist_text_features: Tensor | None = None,
        output_dict: bool = False,
        pair_weights: Tensor | None = None,
    ) -> dict[str, Tensor] | Tensor:
        """Return the loss; arguments as of ``DistillationLoss``, the teacher's features are ignored."""
        check_features(image_features, text_features)
        with float32_math(image_features.device.type):
            cosines = self._cosines(image_features, text_features)
            weights = self._all_ranks_weights(pair_weights)
            loss = self._contrastive(cosines, logit_scale, weights, self.smoothing)
        return {"contrastive_loss": loss} if output_dict else loss


class DistillationLoss(_PairLoss):
    """InfoNCE plus distillation from a teacher's similarities (paper, section 3.1, "KD").

    With ``S = vv_coef v~ v~^T + tt_coef t~ t~^T + v~ t~^T`` for image rows, the last term transposed for
    text rows, targets are ``P = softmax(teacher_scale * S)`` by rows, the distillation term is
    ``KL(P || softmax(s_d v t^T))``, the total ``alpha * contrastive + (1 - alpha) * distillation``.

    By default both coefficients are 0: the target is the teacher's own image-text softmax. With both 1,
    as in the released code, it is at scale 100 the pair itself, and the loss InfoNCE's.

    Attributes:
        distill_logit_scale: log of ``s_d``, learned, starts at 3.9; None with ``share_logit_scale``. Its
            gradient is the mean over the ranks.
        target_statistics: of the last call, means over this rank's image rows: ``target_entropy``
            (nats), ``target_top_share`` (mass on a row's largest entry) and, with a transport plan,
            ``marginal_error`` (relative error of its row sums).
    """

    iterations, remove_diagonal, ot_scope = 0, False, "global"  # no transport: OtterLoss sets them

    def __init__(
        self,
        alpha: float = 0.5,
        teacher_scale: float = 100.0,
        vv_coef: float = 0.0,
        tt_coef: float = 0.0,
        *,
        share_logit_scale: bool = False,
        impl: str = "auto",
        **clip_loss: Any,
    ) -> None:
        """Set up the loss.

        Args:
            alpha: weight of the contrastive term, in [0, 1].
            teacher_scale: scale of the teacher's similarities, ``T_t`` in the paper's code.
            vv_coef: weight of the image-image similarity, the paper's gamma_v.
            tt_coef: weight of the text-text similarity, the paper's gamma_t.
            share_logit_scale: use the model's ``logit_scale`` in the distillation term as well.
            impl: "plain" is this file. The others are ``fast``: "dense" holds two B x N matrices between
                forward and backward, "streaming" computes them anew each time they are read, "auto" is
                dense while they take at most an eighth of the device's memory. ``ot_scope="local"`` and
                ``local_loss`` without ``gather_with_grad`` run plain whatever it says.
            **clip_loss: of ``open_clip.ClipLoss``: local_loss, gather_with_grad, rank, world_size.

        Raises:
            ValueError: naming the argument that is out of range.
        """
        super().__init__(impl, clip_loss)
        self.alpha = check_interval("alpha", alpha, 0.0, 1.0)
        self.teacher_scale = check_interval("teacher_scale", teacher_scale, 0.0, MAX_COEF)
        self.vv_coef = check_interval("vv_coef", vv_coef, 0.0, MAX_COEF)
        self.tt_coef = check_interval("tt_coef", tt_coef, 0.0, MAX_COEF)
        self.distill_logit_scale = None
        if not share_logit_scale:
            self.distill_logit_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        self.target_statistics: dict[str, Tensor] = {}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor | None = None,
        dist_text_features: Tensor | None = None,
        dist_logit_scale: Tensor | None = None,
        output_dict: bool = False,
        pair_weights: Tensor | None = None,
    ) -> dict[str, Tensor] | Pair:
        """Return the two weighted terms. Their sum is the loss; its mean over ranks the batch's.

        Without the teacher's features the student is its own teacher: what it gives, without a gradient.

        Args:
            image_features: (B, D) unit-norm student features.
            text_features: (B, D) unit-norm student features.
            logit_scale: scalar s, already exponentiated.
            dist_image_features: (B, D') unit-norm teacher features, to which no gradient goes, or None.
            dist_text_features: (B, D') unit-norm teacher features, or None like the images'.
            dist_logit_scale: ignored; open_clip's loop passes the teacher's.
            output_dict: return ``{"contrastive_loss": ..., "distill_loss": ...}`` instead of a tuple.
            pair_weights: (B,) by which the pairs' contrastive terms are multiplied, or None.

        Raises: ValueError if the features' shapes do not fit each other.
        """
        student = (image_features, text_features)
        if dist_image_features is None or dist_text_features is None:
            if dist_image_features is not dist_text_features:
                raise ValueError(
                    "dist_image_features and dist_text_features go together: give both or none"
                )
            dist_image_features, dist_text_features = student
        teacher = (dist_image_features.detach(), dist_text_features.detach())
        check_features(*student, *teacher)
        distill_scale = self.distill_scale(logit_scale)
        weights = self._all_ranks_weights(pair_weights)
        if self.impl == "plain" or not fast.covers(self):
            with float32_math(image_features.device.type):
                cosines = self._cosines(*student)
                contrastive = self._contrastive(cosines, logit_scale, weights)
                distillation = self._distillation(cosines, distill_scale, self.targets(*teacher))
        else:
            if not self.sharded:
                student = self._all_ranks(*student, student=True)
                teacher = self._all_ranks(*teacher, student=False)
            contrastive, distillation, self.target_statistics = fast.terms(
                self, student, (logit_scale, distill_scale), teacher, weights
            )
        terms = (self.alpha * contrastive, (1 - self.alpha) * distillation)
        return {"contrastive_loss": terms[0], "distill_loss": terms[1]} if output_dict else terms

    def _distillation(self, directions: Pair, scale: Tensor, targets: Pair) -> Tensor:
        """KL(P || softmax(s_d C)) by rows."""
        halves = []
        for cosines, target in zip(directions, targets, strict=True):
            log_predicted = (scale * cosines).log_softmax(dim=1)
            halves.append(F.kl_div(log_predicted, target, reduction="batchmean") / 2)
        return halves[0] + halves[1]

    @torch.no_grad()
    def targets(self, dist_image_features: Tensor, dist_text_features: Tensor) -> Pair:
        """Target distributions of the image rows and of the text rows, (rows, N) each.

        The rows are this rank's with ``local_loss``, otherwise all. Sets ``target_statistics``.

        Args:
            dist_image_features: (B, D') teacher features.
            dist_text_features: (B, D') teacher features.
        """
        teacher = (dist_image_features, dist_text_features)
        with float32_math(dist_image_features.device.type):
            v, t, all_v, all_t = self._rows_and_columns(*teacher, student=False)
            same = self.vv_coef * v @ all_v.T + self.tt_coef * t @ all_t.T
            of_texts = self._target(same + t @ all_v.T)
            return self._target(same + v @ all_t.T), of_texts  # last: the statistics are of images

    def _target(self, similarity: Tensor) -> Tensor:
        """Rows of mass 1 from similarities: a softmax, and with iterations Sinkhorn's plan before it."""
        log_plan = self.teacher_scale * similarity
        statistics = self.target_statistics = {}
        if self.remove_diagonal and log_plan.shape[1] > 1:
            log_plan[self._own_pairs(log_plan)] = -math.inf
        if self.iterations > 0:
            group = dist.group.WORLD if self.sharded and self.ot_scope == "global" else None
            log_plan = log_sinkhorn(log_plan, self.iterations, group)
            rows = len(log_plan) * (1 if group is None else self.world_size)
            masses = rows * log_plan.logsumexp(dim=1).exp()
            statistics["marginal_error"] = (masses - 1).abs().mean()
        target = F.softmax(log_plan, dim=1)
        statistics["target_entropy"] = torch.special.entr(target).sum(dim=1).mean()
        statistics["target_top_share"] = target.amax(dim=1).mean()
        return target

    def distill_scale(self, logit_scale: Tensor | None = None) -> Tensor:
        """``s_d``, the scale of the distillation term, clamped to [1, 100] after exp.

        Raises:
            ValueError: if it is the model's own, ``logit_scale``, and that is not given.
        """
        if self.distill_logit_scale is not None:
            log_scale = self.distill_logit_scale.clone()
            if self.world_size > 1 and log_scale.requires_grad:
                # It is no parameter of the model that DDP wraps, which averages gradients over ranks.
                log_scale.register_hook(mean_over_ranks)
            return log_scale.clamp(0.0, MAX_LOG_SCALE).exp()
        if logit_scale is None:
            raise ValueError(
                "with share_logit_scale=True s_d is the model's scale; give logit_scale"
            )
        return logit_scale


class OtterLoss(DistillationLoss):
    """InfoNCE plus distillation from optimal-transport matchings (paper, section 3.2, eqs. 5-8).

    As ``DistillationLoss``, with ``iterations`` of Sinkhorn on ``exp(S / epsilon)``, rows first, before
    each row is normalised. The plan is that of all ranks' pairs; with ``local_loss`` each rank holds its
    own B x N rows of it and only column sums travel.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        epsilon: float = 0.15,
        iterations: int = 5,
        vv_coef: float = 1.0,
        tt_coef: float = 1.0,
        remove_diagonal: bool = True,
        *,
        ot_scope: str = "global",
        **common: Any,
    ) -> None:
        """Set up the loss.

        Args:
            alpha: weight of the contrastive term, in [0, 1].
            epsilon: entropic regularisation, the paper's lambda, at least 1e-3.
            iterations: Sinkhorn updates.
            vv_coef: weight of the image-image similarity, the paper's gamma_v.
            tt_coef: weight of the text-text similarity, the paper's gamma_t.
            remove_diagonal: no target mass on the pair itself: the contrastive term carries it.
            ot_scope: with "local" (and ``local_loss``) each rank transports its own rows to all columns
                by itself, as the reference does without ``--global_ot``.
            **common: share_logit_scale, impl and ClipLoss's, see ``DistillationLoss``.

        Raises:
            ValueError: naming the argument that is out of range.
        """
        self.epsilon = check_interval("epsilon", epsilon, MIN_LAMBDA, math.inf)
        super().__init__(alpha, 1 / epsilon, vv_coef, tt_coef, **common)
        self.iterations = check_count("iterations", iterations)
        self.remove_diagonal = remove_diagonal
        self.ot_scope = check_choice("ot_scope", ot_scope, OT_SCOPES)
