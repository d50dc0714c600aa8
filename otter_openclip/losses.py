"""The paper's objectives as open_clip losses: label smoothing, knowledge distillation and OTTER.

All three take ``open_clip.ClipLoss``'s constructor keywords and are called as open_clip's training
loop calls its own losses; InfoNCE is ``open_clip.ClipLoss`` itself. Notation, as in the paper: B rows
per rank, R ranks, N = R * B pairs, D feature width; v, t student image and text features, v~, t~ the
teacher's. Everything is computed in float32 whatever the autocast dtype; ``objective`` is the engine.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import ClipLoss
from open_clip.loss import gather_features
from torch import Tensor, nn

from otter_openclip.blocks import IMPLEMENTATIONS
from otter_openclip.collectives import full_precision, gather_rows
from otter_openclip.objective import Setting, TeacherFeatures, float32_math, objective
from otter_openclip.sinkhorn import check_sinkhorn_settings, sinkhorn

INITIAL_LOG_SCALE = 3.9
MAX_LOG_SCALE = math.log(100.0)
OT_SCOPES = ("global", "local")


def _check_interval(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value}")
    return value


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def _check_features(images: Tensor, texts: Tensor, teacher: tuple[Tensor, Tensor] | None) -> None:
    if images.ndim != 2 or images.shape != texts.shape:
        raise ValueError(
            "image_features and text_features must both be (B, D), got "
            f"{tuple(images.shape)} and {tuple(texts.shape)}"
        )
    if teacher is None:
        return
    shapes = [tuple(x.shape) for x in teacher]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != len(images):
        raise ValueError(
            f"dist_image_features and dist_text_features must both be ({len(images)}, D'), one row for "
            f"each pair of the student's, got {shapes[0]} and {shapes[1]}"
        )


class _PairLoss(ClipLoss):
    """Arranges features into rows and columns, as open_clip's distributed flags ask."""

    alpha = 1.0
    smoothing = 0.0

    def __init__(
        self, impl: str, local_loss: bool, gather_with_grad: bool, rank: int, world_size: int
    ) -> None:
        super().__init__(
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            rank=rank,
            world_size=world_size,
        )
        self.impl = _check_choice("impl", impl, IMPLEMENTATIONS)
        self.target_statistics: dict[str, Tensor] = {}

    def _gather_both(
        self, images: Tensor, texts: Tensor, *, local_loss: bool, with_grad: bool
    ) -> tuple[Tensor, Tensor]:
        return gather_features(
            images.contiguous(),
            texts.contiguous(),
            local_loss=local_loss,
            gather_with_grad=with_grad,
            rank=self.rank,
            world_size=self.world_size,
        )

    def _terms(
        self,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        distill_scale: Tensor | None = None,
        teacher: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Both weighted terms; sets ``target_statistics``."""
        _check_features(images, texts, teacher)
        with float32_math(images.device.type):
            if self.world_size > 1 and self.local_loss:
                if self._each_rank_alone():
                    return self._rows_alone(images, texts, scale, distill_scale, teacher)
                return self._sharded(images, texts, scale, distill_scale, teacher)
            if self.world_size > 1:
                images, texts = self._gather_both(
                    images, texts, local_loss=False, with_grad=self.gather_with_grad
                )
                if teacher is not None:
                    teacher = self._gather_both(*teacher, local_loss=True, with_grad=False)
            images, texts = full_precision(images), full_precision(texts)
            if teacher is not None:
                teacher = self._teacher(teacher, teacher)
            return self._objective(images, texts, scale, distill_scale, teacher, Setting())

    def _sharded(
        self,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        distill_scale: Tensor | None,
        teacher: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """This rank's images against everyone's texts; the other direction by columns."""
        all_texts = gather_rows(texts, self.world_size, with_grad=True)
        if teacher is not None:
            everyone = tuple(gather_rows(x, self.world_size) for x in teacher)
            teacher = self._teacher(teacher, everyone)
        setting = Setting(
            offset=self.rank * len(images),
            world_size=self.world_size,
            cross_gradients=self.gather_with_grad,
        )
        images = full_precision(images)
        return self._objective(images, all_texts, scale, distill_scale, teacher, setting)

    def _rows_alone(
        self,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        distill_scale: Tensor | None,
        teacher: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Each direction by its own rows, against columns of every rank."""
        all_images, all_texts = self._gather_both(
            images, texts, local_loss=True, with_grad=self.gather_with_grad
        )
        images, texts, all_images, all_texts = map(
            full_precision, (images, texts, all_images, all_texts)
        )
        everyone = tuple(gather_rows(x, self.world_size) for x in teacher)
        setting = Setting(offset=self.rank * len(images), both=False)
        of_texts = self._objective(
            *(texts, all_images, scale, distill_scale),
            self._teacher(teacher, everyone, of_texts=True),
            setting,
        )
        of_images = self._objective(
            images, all_texts, scale, distill_scale, self._teacher(teacher, everyone), setting
        )
        return of_images[0] + of_texts[0], of_images[1] + of_texts[1]

    def _objective(
        self,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        distill_scale: Tensor | None,
        teacher: TeacherFeatures | None,
        setting: Setting,
    ) -> tuple[Tensor, Tensor | None]:
        setting = dataclasses.replace(
            setting, alpha=self.alpha, smoothing=self.smoothing, implementation=self.impl
        )
        contrastive, distillation, self.target_statistics = objective(
            rows, columns, scale, distill_scale, teacher, setting
        )
        return contrastive, distillation

    def _each_rank_alone(self) -> bool:
        return False

    def _teacher(
        self,
        mine: tuple[Tensor, Tensor],
        everyone: tuple[Tensor, Tensor],
        *,
        of_texts: bool = False,
    ) -> TeacherFeatures:
        """The teacher's (image, text) features of this rank and of all, for image or text rows."""
        raise TypeError(f"{type(self).__name__} has no teacher")


class LabelSmoothingLoss(_PairLoss):
    """InfoNCE with smoothed targets (paper, section 4.1, "LS").

    The target is ``1 - smoothing`` on the pair and ``smoothing / (N - 1)`` on each other column.
    """

    def __init__(
        self,
        smoothing: float,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
        *,
        impl: str = "auto",
    ) -> None:
        """Set up the loss; raises ValueError if ``smoothing`` is outside [0, 1].

        Args:
            smoothing: target mass on the other pairs, in [0, 1].
            local_loss: see ``open_clip.ClipLoss``.
            gather_with_grad: see ``open_clip.ClipLoss``.
            rank: rank of this process.
            world_size: number of processes.
            impl: "dense", "streaming" or "auto", see ``DistillationLoss``.
        """
        super().__init__(impl, local_loss, gather_with_grad, rank, world_size)
        self.smoothing = _check_interval("smoothing", smoothing, 0.0, 1.0)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor | None = None,
        dist_text_features: Tensor | None = None,
        output_dict: bool = False,
    ) -> dict[str, Tensor] | Tensor:
        """Mean over both directions of the smoothed cross entropy.

        Args:
            image_features: (B, D) unit-norm.
            text_features: (B, D) unit-norm.
            logit_scale: scalar, already exponentiated.
            dist_image_features: ignored; there so that all losses of this package are called alike.
            dist_text_features: ignored, likewise.
            output_dict: return ``{"contrastive_loss": ...}`` instead of the scalar.

        Raises:
            ValueError: if the features are not two (B, D) matrices.
        """
        loss, _ = self._terms(image_features, text_features, logit_scale)
        return {"contrastive_loss": loss} if output_dict else loss


class DistillationLoss(_PairLoss):
    """InfoNCE plus distillation from a teacher's similarities (paper, section 3.1, "KD").

    The targets are ``softmax(teacher_scale * S)`` by rows with, for image rows,
    ``S = vv_coef v~ v~^T + tt_coef t~ t~^T + v~ t~^T`` and for text rows the last term transposed. The
    distillation term is ``KL(target || softmax(s_d v t^T))``, mean over rows and both directions, and
    the total ``alpha * contrastive + (1 - alpha) * distillation``.

    The reference adds up the two directions where open_clip, and this class, average them: its
    losses, and so its gradients, are twice these.

    Attributes:
        distill_logit_scale: log of ``s_d``, learned, starts at 3.9; None with ``share_logit_scale``.
        target_statistics: scalars about the last call's targets, averaged over this rank's image
            rows: ``target_entropy`` (nats), ``target_top_share`` (mass on each row's largest entry)
            and, for OTTER, ``marginal_error`` (relative error of the plan's row sums).
    """

    def __init__(
        self,
        alpha: float = 0.5,
        teacher_scale: float = 100.0,
        vv_coef: float = 1.0,
        tt_coef: float = 1.0,
        *,
        share_logit_scale: bool = False,
        impl: str = "auto",
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Set up the loss.

        Args:
            alpha: weight of the contrastive term, in [0, 1].
            teacher_scale: scale of the teacher's similarities, ``T_t`` in the paper's code.
            vv_coef: weight of the image-image similarity.
            tt_coef: weight of the text-text similarity.
            share_logit_scale: use the model's ``logit_scale`` in the distillation term as well.
            impl: "dense" holds two B x N matrices between forward and backward; "streaming" computes
                them anew, block by block, each time they are read, and holds nothing of that size;
                "auto" is dense while those matrices take at most an eighth of the device's memory.
            local_loss: see ``open_clip.ClipLoss``.
            gather_with_grad: see ``open_clip.ClipLoss``.
            rank: rank of this process.
            world_size: number of processes.

        Raises:
            ValueError: if ``alpha`` is outside [0, 1] or a scale or coefficient is not finite.
        """
        super().__init__(impl, local_loss, gather_with_grad, rank, world_size)
        self.alpha = _check_interval("alpha", alpha, 0.0, 1.0)
        for name, value in (
            ("teacher_scale", teacher_scale),
            ("vv_coef", vv_coef),
            ("tt_coef", tt_coef),
        ):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value}")
        self.teacher_scale = teacher_scale
        self.vv_coef = vv_coef
        self.tt_coef = tt_coef
        self.distill_logit_scale = (
            None if share_logit_scale else nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | None = None,
        output_dict: bool = False,
    ) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
        """Return the two weighted terms; their sum is the loss.

        Args:
            image_features: (B, D) unit-norm student features.
            text_features: (B, D) unit-norm student features.
            logit_scale: scalar, already exponentiated.
            dist_image_features: (B, D') teacher features, unit norm; no gradient goes there. On a CPU
                norms are measured and any will do; on a GPU much longer ones overflow.
            dist_text_features: (B, D') likewise.
            dist_logit_scale: ignored; open_clip's loop passes the teacher's.
            output_dict: return ``{"contrastive_loss": ..., "distill_loss": ...}`` instead of a tuple.

        Raises:
            ValueError: if the features' shapes do not fit each other.
        """
        contrastive, distillation = self._terms(
            image_features,
            text_features,
            logit_scale,
            self.distill_scale(logit_scale),
            (dist_image_features.detach(), dist_text_features.detach()),
        )
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distillation}
        return contrastive, distillation

    def distill_scale(self, logit_scale: Tensor | None = None) -> Tensor:
        """``s_d``, the scale of the distillation term, clamped to [1, 100] after exp."""
        if self.distill_logit_scale is None:
            return logit_scale
        return self.distill_logit_scale.clamp(0.0, MAX_LOG_SCALE).exp()

    @torch.no_grad()
    def targets(
        self, dist_image_features: Tensor, dist_text_features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Target distributions of this rank's image rows and text rows, (rows, N) each.

        For looking at: written plainly, with whole matrices on every rank. The loss does not call it.

        Args:
            dist_image_features: (B, D') teacher features.
            dist_text_features: (B, D') teacher features.
        """
        with float32_math(dist_image_features.device.type):
            mine = (dist_image_features, dist_text_features)
            everyone, rows = mine, slice(None)
            if self.world_size > 1:
                everyone = tuple(gather_rows(x, self.world_size) for x in mine)
                start = self.rank * len(mine[0])
                rows = slice(start, start + len(mine[0])) if self.local_loss else rows
            return tuple(
                self._plain_targets(self._teacher(everyone, everyone, of_texts=of_texts), rows)
                for of_texts in (False, True)
            )

    def _plain_targets(self, teacher: TeacherFeatures, rows: slice) -> Tensor:
        similarities = teacher.similarity(slice(None))
        return F.softmax(similarities[rows], dim=1)

    def _teacher(
        self,
        mine: tuple[Tensor, Tensor],
        everyone: tuple[Tensor, Tensor],
        *,
        of_texts: bool = False,
    ) -> TeacherFeatures:
        coefs = (self.vv_coef, self.tt_coef)
        if of_texts:
            mine, everyone, coefs = mine[::-1], everyone[::-1], coefs[::-1]
        given = tuple(x.contiguous() for x in (*mine, *everyone))
        compact = given if given[0].dtype in (torch.float16, torch.bfloat16) else None
        full = map(full_precision, given)
        return TeacherFeatures(*full, compact, *coefs, **self._targets_setting())

    def _targets_setting(self) -> dict[str, Any]:
        return {"epsilon": 1 / self.teacher_scale, "iterations": 0, "remove_diagonal": False}


class OtterLoss(DistillationLoss):
    """InfoNCE plus distillation from optimal-transport matchings (paper, section 3.2, eqs. 5-8).

    As ``DistillationLoss``, with the targets from ``iterations`` Sinkhorn updates on
    ``exp(S / epsilon)``, rows first, and each row normalised at the end. With ``remove_diagonal`` a
    pair gets no mass on itself: the contrastive term carries it.

    With several ranks and ``ot_scope="global"`` the transport problem is the whole batch's: with
    ``local_loss`` each rank holds its own B x N rows and only column sums travel. With ``"local"``
    each rank transports its own rows to all N columns by itself, as the reference does without
    ``--global_ot``.
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
        share_logit_scale: bool = False,
        impl: str = "auto",
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Set up the loss.

        Args:
            alpha: weight of the contrastive term, in [0, 1].
            epsilon: entropic regularisation, the paper's lambda.
            iterations: Sinkhorn updates.
            vv_coef: weight of the image-image similarity, the paper's gamma_v.
            tt_coef: weight of the text-text similarity, the paper's gamma_t.
            remove_diagonal: give a pair no target mass on itself.
            ot_scope: "global" or "local", see the class.
            share_logit_scale: use the model's ``logit_scale`` in the distillation term as well.
            impl: "dense", "streaming" or "auto", see ``DistillationLoss``.
            local_loss: see ``open_clip.ClipLoss``.
            gather_with_grad: see ``open_clip.ClipLoss``.
            rank: rank of this process.
            world_size: number of processes.

        Raises:
            ValueError: naming the argument that is out of range.
        """
        super().__init__(
            alpha=alpha,
            vv_coef=vv_coef,
            tt_coef=tt_coef,
            share_logit_scale=share_logit_scale,
            impl=impl,
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            rank=rank,
            world_size=world_size,
        )
        check_sinkhorn_settings(epsilon, iterations)
        self.epsilon = epsilon
        self.iterations = iterations
        self.remove_diagonal = remove_diagonal
        self.ot_scope = _check_choice("ot_scope", ot_scope, OT_SCOPES)

    def _each_rank_alone(self) -> bool:
        return self.ot_scope == "local"

    def _targets_setting(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon,
            "iterations": self.iterations,
            "remove_diagonal": self.remove_diagonal,
        }

    def _plain_targets(self, teacher: TeacherFeatures, rows: slice) -> Tensor:
        cost = teacher.similarity(slice(None)).mul_(-self.epsilon)
        if self.remove_diagonal and len(cost) > 1:
            cost.fill_diagonal_(math.inf)
        if self.ot_scope == "local":
            cost = cost[rows]
        plan = sinkhorn(cost, self.epsilon, self.iterations)
        if self.ot_scope == "global":
            plan = plan[rows]
        return plan / plan.sum(dim=1, keepdim=True)
