"""The EMA teacher (OTTER, section 3.3): a second model that follows the student's parameters."""

from __future__ import annotations

from typing import Any

import torch
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor, nn

from otter_openclip.numerics import check_interval

_HALF = (torch.float16, torch.bfloat16)


class EmaTeacher(ModelEmaV3):
    """timm's moving average of a model, with the reference's decay, run as the model's teacher.

    Update n has the decay ``min(decay, (1 + n) / (10 + n))``. The reference updates at the start of each
    training forward, so the update before the first forward is n = 1 and changes nothing; ``update`` is
    called after each optimizer step here and starts at n = 2. Only parameters are averaged, those in
    half precision in float32 copies, because updates of ``1 - decay`` are lost to their rounding.

    Attributes:
        module: the teacher, a copy of the bare model without gradients.
        num_updates: n of the last update.
        eval_mode: run in eval mode with the student's buffers. By default the teacher runs in train
            mode, as in the reference, and its batch-norm statistics are those of its own forwards.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, *, eval_mode: bool = False) -> None:
        """Copy ``model``, made with ``output_dict=True`` and seen through wrappers.

        Raises: ValueError if ``decay`` is outside [0, 1].
        """
        check_interval("decay", decay, 0.0, 1.0)
        warmup: dict[str, Any] = {"use_warmup": True, "warmup_gamma": 9.0, "warmup_power": 1.0}
        super().__init__(unwrap_model(model), decay=decay, exclude_buffers=True, **warmup)
        self.num_updates, self.eval_mode = 1, eval_mode
        self.module.requires_grad_(False).train(not eval_mode)
        if hasattr(self.module, "set_grad_checkpointing"):
            self.module.set_grad_checkpointing(False)  # nothing to recompute without gradients
        # What a copy shares with the model, it need not follow.
        students = {id(parameter) for parameter in model.parameters()}
        named = self.module.named_parameters()
        parameters = {name: param for name, param in named if id(param) not in students}
        self._shapes = {name: param.shape for name, param in parameters.items()}
        self._half = {name: param for name, param in parameters.items() if param.dtype in _HALF}
        self._masters = {name: param.float() for name, param in self._half.items()}
        self._averages = list((parameters | self._masters).values())

    def train(self, mode: bool = True) -> EmaTeacher:
        """Follow the student into train mode, unless the teacher runs in eval mode."""
        return super().train(mode and not self.eval_mode)

    @torch.no_grad()
    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """The teacher's (B, D) features of a batch, under the names that the losses take."""
        output = self.module(image, text)
        return {f"dist_{name}": output[name] for name in ("image_features", "text_features")}

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Move towards ``model``: one fused call for all parameters.

        Args:
            model: the student.
            step: optimizer steps done so far; counted if not given.

        Raises:
            ValueError: if the parameters of ``model`` are not those the teacher was made from.
        """
        self.num_updates = (self.num_updates if step is None else step) + 1
        super().update(unwrap_model(model), step=self.num_updates + 2)

    def apply_update_no_buffers_(self, model: nn.Module, decay: float) -> None:
        """Average the parameters; in eval mode also copy the buffers."""
        student = {n: param for n, param in model.named_parameters() if n in self._shapes}
        if self._shapes != (shapes := {name: param.shape for name, param in student.items()}):
            wrong = sorted(dict(self._shapes.items() ^ shapes.items()))
            raise ValueError(
                f"the model does not fit the teacher: {len(wrong)} parameters differ, first {wrong[0]!r}"
            )
        source = [param.float() if param.dtype in _HALF else param for param in student.values()]
        torch._foreach_lerp_(self._averages, source, 1.0 - decay)
        if self._half:
            torch._foreach_copy_(list(self._half.values()), list(self._masters.values()))
        if self.eval_mode:
            for buffer, students in zip(self.module.buffers(), model.buffers(), strict=True):
                buffer.copy_(students)

    def get_extra_state(self) -> dict[str, Any]:
        """What an exact continuation needs beside ``module.state_dict()``; part of ``state_dict()``."""
        return {"num_updates": self.num_updates, "masters": dict(self._masters)}

    @torch.no_grad()
    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore it, once ``module`` has its weights: a master that is not there is taken from them."""
        self.num_updates = int(state["num_updates"])
        for name, master in self._masters.items():
            master.copy_(state["masters"].get(name, self._half[name]))
