"""The module that open_clip's loop trains: the student, with its teacher's features in the output."""

from __future__ import annotations

from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from otter_openclip.frozen import prefix
from otter_openclip.frozen.loader import split_weights
from otter_openclip.teacher import EmaTeacher

Features = dict[str, Tensor]
_INPUTS = {"visual": 0, "text": 1}  # where a tower's input stands among the model's


class Teacher:
    """Where a batch's targets come from. This one is the student itself: the loss takes its features.

    Attributes:
        module: the model that runs beside the student; None if none does.
        ema: what moves ``module``, if it is the student's moving average.
        shares_prefixes: whether it takes what the student's frozen prefixes give.
    """

    module: nn.Module | None = None
    ema: EmaTeacher | None = None
    shares_prefixes = True

    def __init__(self, student: nn.Module | None = None) -> None:
        """With a ``student`` its features are computed once more, from inputs without dropout."""
        self._student = student

    @torch.no_grad()
    def features(self, images: Tensor, texts: Tensor) -> Features:
        """``dist_image_features`` and ``dist_text_features``, (B, D'); {} for the student's own."""
        model = self._student if self.module is None else self.module
        if model is None:
            return {}
        output = unwrap_model(model)(images, texts)
        return {f"dist_{name}": output[name] for name in ("image_features", "text_features")}


class MovingAverage(Teacher):
    """The EMA of the student, which shares its frozen prefixes."""

    def __init__(
        self, args: Namespace, model: nn.Module, prefixes: Mapping[str, str], *, eval_mode: bool
    ) -> None:
        with prefix.shared(unwrap_model(model), prefixes.values()):
            self.ema = EmaTeacher(model, args.ema_decay, eval_mode=eval_mode)
        self.module = as_teacher(self.ema.module, prefixes.values())


def as_teacher(model: nn.Module, frozen: Iterable[str] = ()) -> nn.Module:
    """``model`` with parameters that ask for gradients, which it is never given, but for ``frozen``.

    It runs under no_grad; but torch multiplies a (batch, length, width) input by a weight in one product
    only if the weight asks for a gradient.
    """
    model.requires_grad_(True)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    return model


def locked_batch_norms(model: nn.Module) -> list[str]:
    """Names of the image tower's batch norms whose parameters are locked."""
    return [
        f"visual.{name}"
        for name, module in unwrap_model(model).visual.named_modules()
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters())
    ]


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
        weighted: bool = False,
    ) -> None:
        """Put the two side by side.

        Args:
            student: in DDP and compiled or not.
            teacher: None for losses without one.
            accum_freq: micro-batches for each optimizer step.
            distill_logit_scale: registered here so that gradient clipping sees it.
            frozen: names of modules that are never in train mode.
            prefixes: ``frozen.prefix.find_prefixes`` of the student, installed.
            feature_dropout: on what the prefixes give, for the student in training.
            weighted: whether texts come with their pairs' weights (``add_weights``).
        """
        super().__init__()
        self.student, self.teacher = student, teacher
        self.average = None if teacher is None else teacher.ema
        self.distill_logit_scale = distill_logit_scale
        self._accum_freq, self._feature_dropout = accum_freq, feature_dropout
        self._frozen, self._prefixes, self._weighted = frozen, prefixes or {}, weighted
        self._waiting: deque[tuple[list[Tensor], Features]] = deque()

    @property
    def module(self) -> nn.Module:
        """The bare student: open_clip's loop clamps ``unwrap_model(model).logit_scale``."""
        return unwrap_model(self.student)

    def train(self, mode: bool = True) -> StudentWithTeacher:
        """Set the student's mode, and that of a moving average that follows it."""
        super().train(mode)
        averages = [] if self.average is None else [self.average.module]
        for model in (self.module, *averages):
            for name in self._frozen:
                model.get_submodule(name).eval()
        return self

    def start_epoch(self) -> None:
        """Forget micro-batches that the last epoch left without a step."""
        self._waiting.clear()

    def forward(self, images: Tensor, texts: Tensor) -> Features:
        """Student's output dict plus the teacher's two (B, D') features, and weights of the pairs."""
        if self._accum_freq > 1 and torch.is_grad_enabled():
            inputs, features = self._waiting.popleft()
            output = dict(self.student(*inputs))
            output["logit_scale"].register_hook(lambda gradient: gradient / self._accum_freq)
            return output | features
        features = {}
        if self._weighted:
            texts, features["pair_weights"] = split_weights(texts)
        inputs = [images, texts]
        for tower in self._prefixes:
            place = _INPUTS[tower]
            if not prefix.is_output(inputs[place]):  # it comes from --feature-cache
                inputs[place] = prefix.run(self.module, tower, inputs[place])
        dropped = self._dropped(inputs)
        output = dict(self.student(*dropped))
        if self.teacher is not None:
            shared = self.teacher.shares_prefixes
            features |= self.teacher.features(*(inputs if shared else (images, texts)))
        if self._accum_freq > 1:
            self._waiting.append((dropped, features))
        return output | features

    def _dropped(self, inputs: list[Tensor]) -> list[Tensor]:
        """Inputs with dropout, in train mode, on what the prefixes give."""
        inputs = list(inputs)
        for tower in self._prefixes if self._feature_dropout else ():
            place = _INPUTS[tower]
            inputs[place] = F.dropout(inputs[place], self._feature_dropout, self.training)
        return inputs
