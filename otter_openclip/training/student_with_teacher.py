"""The module that open_clip's loop trains: the student, with the teacher's features in its output."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from otter_openclip.frozen.prefix import is_output, run
from otter_openclip.training.batch_norm import keep_in_eval_mode

Features = dict[str, Tensor]


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        """Return ``value`` itself."""
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Scale the gradient."""
        return gradient * ctx.factor, None


def as_teacher(model: nn.Module) -> nn.Module:
    """``model`` with parameters that ask for gradients, which it is never given.

    It runs under no_grad; but torch multiplies a (batch, length, width) input by a weight in one product
    only if the weight asks for a gradient.
    """
    return model.requires_grad_(True)


class StudentWithTeacher(nn.Module):
    """A student whose output dict also holds ``dist_image_features`` and ``dist_text_features``.

    With gradient accumulation open_clip's loop runs every micro-batch twice: without gradients to
    collect the features of the whole batch, then with gradients, one micro-batch at a time. The
    teacher, and what is frozen, run in the first pass only; the second hands out what they gave again
    in the same order.
    In the second pass the whole batch's loss is differentiated once for each micro-batch, so what
    does not belong to one micro-batch, ``logit_scale``, gets its gradient ``accum_freq`` times too
    large; it is divided here.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        teacher_forward: Callable[..., Features] | None = None,
        train_teacher: bool = True,
        accum_freq: int = 1,
        distill_logit_scale: nn.Parameter | None = None,
        frozen: Sequence[str] = (),
        prefixes: Mapping[str, str] | None = None,
        shares_prefixes: bool = False,
    ) -> None:
        """Put the two side by side.

        Args:
            student: the model as open_clip's ``main`` made it, in DDP and compiled or not.
            teacher: a bare open_clip model; None for losses without one.
            teacher_forward: what to call instead of ``teacher``, e.g. its compiled form.
            train_teacher: follow the student into train mode; otherwise stay in eval mode.
            accum_freq: micro-batches for each optimizer step.
            distill_logit_scale: registered here so that gradient clipping sees it.
            frozen: names of the student's modules that are never in train mode, nor are the teacher's.
            prefixes: ``features.prefix.find_prefixes`` of the student, installed.
            shares_prefixes: whether they are the teacher's too.
        """
        super().__init__()
        self.student = student
        self.teacher = teacher
        self._teacher_forward = teacher if teacher_forward is None else teacher_forward
        self._train_teacher = train_teacher
        self._accum_freq = accum_freq
        self._waiting: deque[tuple[tuple[Tensor, Tensor], Features]] = deque()
        self.distill_logit_scale = distill_logit_scale
        self._frozen = frozen
        self._prefixes, self._shares_prefixes = prefixes or {}, shares_prefixes

    @property
    def module(self) -> nn.Module:
        """The bare student: open_clip's loop clamps ``unwrap_model(model).logit_scale``."""
        return unwrap_model(self.student)

    def train(self, mode: bool = True) -> StudentWithTeacher:
        """Set the student's mode, and the teacher's if it follows."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.train(mode and self._train_teacher)
        keep_in_eval_mode(self.student, self._frozen)
        if self.teacher is not None and self._train_teacher:  # a copy of the student
            keep_in_eval_mode(self.teacher, self._frozen)
        return self

    def start_epoch(self) -> None:
        """Forget micro-batches that the last epoch left without a step."""
        self._waiting.clear()

    def forward(self, images: Tensor, texts: Tensor) -> Features:
        """Student's output dict plus the teacher's two (B, D') features."""
        if self._accum_freq > 1 and torch.is_grad_enabled():
            given, features = self._waiting.popleft()
            output = dict(self.student(*given))
            output["logit_scale"] = ScaleGradient.apply(
                output["logit_scale"], 1.0 / self._accum_freq
            )
            return output | features
        given = self._passed_by(images, texts)
        output = dict(self.student(*given))
        features = self._teach(*(given if self._shares_prefixes else (images, texts)))
        if self._accum_freq > 1:
            self._waiting.append((given, features))
        return output | features

    def _passed_by(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """What frozen prefixes give, in place of what they are given."""
        given = {"visual": images, "text": texts}
        for tower in self._prefixes:
            if not is_output(given[tower]):  # it comes from --feature-cache
                given[tower] = run(self.module, tower, given[tower])
        return given["visual"], given["text"]

    @torch.no_grad()
    def _teach(self, images: Tensor, texts: Tensor) -> Features:
        if self._teacher_forward is None:
            return {}
        output = self._teacher_forward(images, texts)
        return {f"dist_{name}": output[name] for name in ("image_features", "text_features")}
