"""The paper's objectives as open_clip losses: label smoothing, knowledge distillation and OTTER.

All three take ``open_clip.ClipLoss``'s constructor keywords and are called as open_clip's training
loop calls its own losses; InfoNCE is ``open_clip.ClipLoss`` itself. Notation, as in the paper: B rows
per rank, R ranks, N = R * B pairs, D feature width; v, t student image and text features, v~, t~ the
teacher's. Everything is computed in float32 whatever the autocast dtype.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip import ClipLoss
from open_clip.loss import gather_features
from torch import Tensor, nn

from otter_openclip.sinkhorn import check_sinkhorn_settings, column_potential

INITIAL_LOG_SCALE = 3.9
MAX_LOG_SCALE = math.log(100.0)
OT_SCOPES = ("global", "local")

# Log of "no mass": finite, so that 0 * log 0 is 0 and a row with nothing else still normalises.
_LOG_ZERO = -1e30


def _check_interval(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value}")
    return value


def _full_precision(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


@contextlib.contextmanager
def _float32_math(device_type: str) -> Iterator[None]:
    """Leave autocast, and TF32 too: at a teacher scale of 100 its 1e-3 would be 10% of a target."""
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


class _PairLoss(ClipLoss):
    """Gathers the features once and hands both directions' cosines to ``_terms``."""

    def _gather(
        self, images: Tensor, texts: Tensor, *, with_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the row features and the column features, (rows, D) x 2 and (N, D) x 2.

        Which features are rows and which gathers carry a gradient are open_clip's rules: the local
        ones with ``local_loss``, else all of them.
        """
        if self.world_size == 1:
            columns = (images, texts)
        else:
            columns = gather_features(
                images.contiguous(),
                texts.contiguous(),
                local_loss=self.local_loss or not with_grad,
                gather_with_grad=self.gather_with_grad and with_grad,
                rank=self.rank,
                world_size=self.world_size,
                use_horovod=self.use_horovod,
            )
        columns = (_full_precision(columns[0]), _full_precision(columns[1]))
        if self.world_size == 1 or not self.local_loss:
            return (*columns, *columns)
        return (_full_precision(images), _full_precision(texts), *columns)

    def _labels(self, rows: int, device: torch.device) -> Tensor:
        """Column index of each row's own pair, (rows,) int64."""
        offset = self.rank * rows if self.world_size > 1 and self.local_loss else 0
        return torch.arange(offset, offset + rows, device=device)

    def _cosines(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        images, texts, all_images, all_texts = self._gather(
            image_features, text_features, with_grad=True
        )
        return images @ all_texts.T, texts @ all_images.T

    @staticmethod
    def _cross_entropy(
        cosines: tuple[Tensor, Tensor], scale: Tensor, labels: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        per_image, per_text = (
            F.cross_entropy(scale * c, labels, label_smoothing=smoothing) for c in cosines
        )
        return (per_image + per_text) / 2


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
    ) -> None:
        """Set up the loss; raises ValueError if ``smoothing`` is outside [0, 1]."""
        super().__init__(
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            rank=rank,
            world_size=world_size,
        )
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
        """
        with _float32_math(image_features.device.type):
            cosines = self._cosines(image_features, text_features)
            rows, columns = cosines[0].shape
            # torch spreads the smoothing over all N columns, the paper over the N - 1 wrong ones.
            smoothing = self.smoothing * columns / (columns - 1) if columns > 1 else 0.0
            labels = self._labels(rows, cosines[0].device)
            loss = self._cross_entropy(cosines, logit_scale, labels, smoothing)
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
        target_statistics: scalars about the last call's targets, averaged over this rank's rows and
            both directions: ``target_entropy`` (nats), ``target_top_share`` (mass on each row's
            largest entry) and, for OTTER, ``marginal_error``.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        teacher_scale: float = 100.0,
        vv_coef: float = 1.0,
        tt_coef: float = 1.0,
        *,
        share_logit_scale: bool = False,
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
            local_loss: see ``open_clip.ClipLoss``.
            gather_with_grad: see ``open_clip.ClipLoss``.
            rank: rank of this process.
            world_size: number of processes.

        Raises:
            ValueError: if ``alpha`` is outside [0, 1] or a scale or coefficient is not finite.
        """
        super().__init__(
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            rank=rank,
            world_size=world_size,
        )
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
        self.target_statistics: dict[str, Tensor] = {}

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
            dist_image_features: (B, D') teacher features, of unit norm or not; no gradient.
            dist_text_features: (B, D') likewise.
            dist_logit_scale: ignored; open_clip's loop passes the teacher's.
            output_dict: return ``{"contrastive_loss": ..., "distill_loss": ...}`` instead of a tuple.
        """
        with _float32_math(image_features.device.type):
            cosines = self._cosines(image_features, text_features)
            labels = self._labels(len(cosines[0]), cosines[0].device)
            contrastive = self._cross_entropy(cosines, logit_scale, labels)
            scale = self.distill_scale(logit_scale)
            log_targets = self._log_targets(dist_image_features, dist_text_features)
            divergences, entropies, top_shares = [], [], []
            for cosine, log_target in zip(cosines, log_targets, strict=True):
                target = log_target.exp()
                entropy = -(target * log_target).sum(dim=1).mean()
                cross_entropy = -(target * F.log_softmax(scale * cosine, dim=1)).sum(dim=1).mean()
                divergences.append(cross_entropy - entropy)
                entropies.append(entropy)
                top_shares.append(target.amax(dim=1).mean())
            distillation = sum(divergences) / 2
        self.target_statistics["target_entropy"] = sum(entropies) / 2
        self.target_statistics["target_top_share"] = sum(top_shares) / 2
        contrastive = self.alpha * contrastive
        distillation = (1 - self.alpha) * distillation
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

        Args:
            dist_image_features: (B, D') teacher features.
            dist_text_features: (B, D') teacher features.
        """
        with _float32_math(dist_image_features.device.type):
            image_rows, text_rows = self._log_targets(dist_image_features, dist_text_features)
            return image_rows.exp(), text_rows.exp()

    @torch.no_grad()
    def _log_targets(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        similarities, labels = self._similarities(images, texts)
        image_rows, text_rows = self._normalise(similarities, labels)
        return image_rows, text_rows

    def _similarities(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher similarities S of image and text rows, (2, rows, N), and the pairs' columns.

        Each direction is one product: ``[a v~ + ..., b t~ + ...] @ [v~, t~]^T``.
        """
        images, texts, all_images, all_texts = self._gather(
            images.detach(), texts.detach(), with_grad=False
        )
        columns = torch.cat([all_images, all_texts], dim=1)
        image_rows = torch.cat([self.vv_coef * images, self.tt_coef * texts + images], dim=1)
        text_rows = torch.cat([self.vv_coef * images + texts, self.tt_coef * texts], dim=1)
        similarities = torch.stack([image_rows, text_rows]) @ columns.T
        return similarities, self._labels(len(images), images.device)

    def _normalise(self, similarities: Tensor, labels: Tensor) -> Tensor:
        """Log targets from similarities, (2, rows, N)."""
        return F.log_softmax(self.teacher_scale * similarities, dim=-1)


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
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            rank=rank,
            world_size=world_size,
        )
        check_sinkhorn_settings(epsilon, iterations)
        if ot_scope not in OT_SCOPES:
            raise ValueError(f"ot_scope must be one of {', '.join(OT_SCOPES)}, got {ot_scope!r}")
        self.epsilon = epsilon
        self.iterations = iterations
        self.remove_diagonal = remove_diagonal
        self.ot_scope = ot_scope

    def _normalise(self, similarities: Tensor, labels: Tensor) -> Tensor:
        log_kernel = similarities.div_(self.epsilon)
        rows, columns = log_kernel.shape[-2:]
        if self.remove_diagonal:
            log_kernel[:, torch.arange(rows, device=labels.device), labels] = _LOG_ZERO
        sharded = rows < columns and self.ot_scope == "global"
        total_rows = columns if sharded else rows
        g, f = column_potential(
            log_kernel,
            self.iterations,
            rows=total_rows,
            reduce_columns=_all_reduce_logsumexp if sharded else None,
        )
        log_plan = log_kernel.add_(g.unsqueeze(-2))
        log_row_sums = torch.logsumexp(log_plan, dim=-1, keepdim=True)
        # The plan's columns are exact after the last update, so its rows carry all of the error.
        row_mass = (f.unsqueeze(-1) + log_row_sums).exp() * total_rows
        self.target_statistics["marginal_error"] = (row_mass - 1).abs().mean()
        return log_plan.sub_(log_row_sums)


def _all_reduce_logsumexp(log_sums: Tensor) -> Tensor:
    """Log of the sum over ranks of ``exp(log_sums)``, element by element."""
    largest = log_sums.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    total = (log_sums - largest).exp_()
    dist.all_reduce(total)
    return total.log_().add_(largest)
