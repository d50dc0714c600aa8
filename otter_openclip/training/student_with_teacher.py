"""The module that open_clip's loop trains: the student, with its teacher's features in the output."""

from __future__ import annotations

from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import Tensor, nn

from otter_openclip.checkpoints.contents import TEACHER
from otter_openclip.frozen import prefix
from otter_openclip.teacher import EmaTeacher
from otter_openclip.training.batch_norm import keep_in_eval_mode

Features = dict[str, Tensor]
_INPUTS = {"visual": 0, "text": 1}  # where a tower's input stands among the model's
_STATE = "teacher_state"


class Teacher:
    """Where a batch's targets come from. This one is the student itself: the loss takes its features.

    Attributes:
        module: the model that runs beside the student; None if none does.
        shares_prefixes: whether it takes what the student's frozen prefixes give.
    """

    module: nn.Module | None = None
    shares_prefixes = True

    def __init__(self, student: nn.Module | None = None) -> None:
        """With a ``student`` its features are computed once more, from inputs without dropout."""
        self._student = student

    def __str__(self) -> str:
        return "Teacher: the student itself"

    @torch.no_grad()
    def features(self, images: Tensor, texts: Tensor) -> Features:
        """``dist_image_features`` and ``dist_text_features``, (B, D); {} for the student's own."""
        if self._student is None:
            return {}
        output = unwrap_model(self._student)(images, texts)
        return {f"dist_{name}": output[name] for name in ("image_features", "text_features")}

    def update(self, student: nn.Module) -> None:
        """Follow the student after a step of the optimizer."""

    def weights(self) -> dict[str, Any]:
        """What a checkpoint has of it beside open_clip's own keys."""
        return {}

    def state(self) -> dict[str, Any]:
        """What the plugin's part of a checkpoint has of it."""
        return {}

    def restore(self, weights: Mapping[str, Tensor] | None, entry: Mapping[str, Any]) -> None:
        """Take up its weights and state from a checkpoint."""


class MovingAverage(Teacher):
    """The EMA of the student, which shares its frozen prefixes."""

    def __init__(
        self, args: Namespace, model: nn.Module, prefixes: Mapping[str, str], *, eval_mode: bool
    ) -> None:
        with prefix.shared(unwrap_model(model), prefixes.values()):
            self.module = self.ema = EmaTeacher(model, args.ema_decay, eval_mode=eval_mode)
        as_teacher(self.ema.module, prefixes.values())

    def __str__(self) -> str:
        mode = "eval" if self.ema.eval_mode else "train"
        return f"EMA teacher: decay {self.ema.decay}, {mode} mode, {self.ema.num_updates} updates so far"

    def features(self, images: Tensor, texts: Tensor) -> Features:
        """The moving average's features, (B, D) each."""
        return self.ema(images, texts)

    def update(self, student: nn.Module) -> None:
        """Move the average."""
        self.ema.update(student)

    def weights(self) -> dict[str, Any]:
        """Its weights, by open_clip 4.x's own name for an EMA's."""
        return {TEACHER: self.ema.module.state_dict()}

    def state(self) -> dict[str, Any]:
        """Its counter and what half precision loses."""
        return {_STATE: self.ema.get_extra_state()}

    def restore(self, weights: Mapping[str, Tensor] | None, entry: Mapping[str, Any]) -> None:
        """Take both up, if the checkpoint is of a run that had a moving average."""
        if weights is not None and _STATE in entry:
            self.ema.module.load_state_dict(weights)
            self.ema.set_extra_state(entry[_STATE])


def as_teacher(model: nn.Module, frozen: Iterable[str] = ()) -> nn.Module:
    """``model`` with parameters that ask for gradients, which it is never given, but for ``frozen``.

    It runs under no_grad; but torch multiplies a (batch, length, width) input by a weight in one product
    only if the weight asks for a gradient.
    """
    model.requires_grad_(True)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    return model


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


class StudentWithTeacher(nn.Module):
    """A student whose output dict also holds ``dist_image_features`` and ``dist_text_features``.

    With gradient accumulation open_clip's loop runs every micro-batch twice: without gradients to
    collect the features of the whole batch, then with gradients, one micro-batch at a time. The
    teacher, and what is frozen, run in the first pass only; the second hands out what they gave again
    in the same order. There the whole batch's loss is differentiated once for each micro-batch, so what
    does not belong to one micro-batch, ``logit_scale``, gets its gradient ``accum_freq`` times too
    large; it is divided here.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None = None,
        *,
        accum_freq: int = 1,
        distill_logit_scale: nn.Parameter | None = None,
        frozen: Sequence[str] = (),
        prefixes: Mapping[str, str] | None = None,
        feature_dropout: float = 0.0,
    ) -> None:
        """Put the two side by side.

        Args:
            student: the model as open_clip's ``main`` made it, in DDP and compiled or not.
            teacher: None for losses without one.
            accum_freq: micro-batches for each optimizer step.
            distill_logit_scale: registered here so that gradient clipping sees it.
            frozen: names of the student's modules that are never in train mode, nor are its average's.
            prefixes: ``frozen.prefix.find_prefixes`` of the student, installed.
            feature_dropout: share of what the prefixes give that the student does not see in training.
        """
        super().__init__()
        self.student, self.teacher = student, teacher
        self.average = teacher.ema if isinstance(teacher, MovingAverage) else None
        self.distill_logit_scale = distill_logit_scale
        self._accum_freq, self._feature_dropout = accum_freq, feature_dropout
        self._frozen, self._prefixes = frozen, prefixes or {}
        self._waiting: deque[tuple[list[Tensor], Features]] = deque()

    @property
    def module(self) -> nn.Module:
        """The bare student: open_clip's loop clamps ``unwrap_model(model).logit_scale``."""
        return unwrap_model(self.student)

    def train(self, mode: bool = True) -> StudentWithTeacher:
        """Set the student's mode, and that of a moving average that follows it."""
        super().train(mode)
        keep_in_eval_mode(self.student, self._frozen)
        if self.average is not None:
            keep_in_eval_mode(self.average.module, self._frozen)
        return self

    def start_epoch(self) -> None:
        """Forget micro-batches that the last epoch left without a step."""
        self._waiting.clear()

    def forward(self, images: Tensor, texts: Tensor) -> Features:
        """Student's output dict plus the teacher's two (B, D') features."""
        if self._accum_freq > 1 and torch.is_grad_enabled():
            inputs, features = self._waiting.popleft()
            output = dict(self.student(*inputs))
            output["logit_scale"] = ScaleGradient.apply(
                output["logit_scale"], 1.0 / self._accum_freq
            )
            return output | features
        inputs = self._after_prefixes([images, texts])
        dropped = self._dropped(inputs)
        output = dict(self.student(*dropped))
        features = {}
        if self.teacher is not None:
            shared = self.teacher.shares_prefixes
            features = self.teacher.features(*(inputs if shared else (images, texts)))
        if self._accum_freq > 1:
            self._waiting.append((dropped, features))
        return output | features

    def _after_prefixes(self, inputs: list[Tensor]) -> list[Tensor]:
        """What frozen prefixes give, in place of what they are given."""
        inputs = list(inputs)
        for tower in self._prefixes:
            place = _INPUTS[tower]
            if not prefix.is_output(inputs[place]):  # it comes from --feature-cache
                inputs[place] = prefix.run(self.module, tower, inputs[place])
        return inputs

    def _dropped(self, inputs: list[Tensor]) -> list[Tensor]:
        """The same with dropout, in train mode, on what the prefixes give."""
        if not self._feature_dropout:
            return inputs
        inputs = list(inputs)
        for tower in self._prefixes:
            place = _INPUTS[tower]
            inputs[place] = F.dropout(inputs[place], self._feature_dropout, self.training)
        return inputs
