"""The EMA teacher (OTTER, section 3.3): a second model that follows the student's parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_HALF = (torch.float16, torch.bfloat16)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the bare module behind ``torch.compile`` and ``DistributedDataParallel``, if any."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, DistributedDataParallel) else model


class EmaTeacher:
    """Exponential moving average of a model's parameters, itself a model that can be run.

    The decay of update n is ``min(decay, (1 + n) / (10 + n))``. The reference updates at the start of
    every training forward, so the update before the first forward is n = 1 and changes nothing; here
    ``update`` is called after each optimizer step and starts at n = 2.

    Parameters held in half precision are averaged in a float32 copy, because an update of
    ``(1 - decay)`` times a small difference is lost to rounding in bfloat16.

    Attributes:
        module: the teacher, a copy of the bare model without gradients.
        num_updates: n of the last update.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, *, eval_mode: bool = False) -> None:
        """Copy ``model`` (DDP and torch.compile wrappers are looked through).

        Args:
            model: the student.
            decay: upper bound of the decay, in [0, 1].
            eval_mode: run the teacher in eval mode and copy the student's buffers at each update.
                By default it runs in train mode, as in the reference, and its batch-norm statistics
                are those of its own forwards.

        Raises:
            ValueError: if ``decay`` is outside [0, 1].
        """
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        self.decay = decay
        self.eval_mode = eval_mode
        self.num_updates = 1
        self.module = copy.deepcopy(unwrap(model)).requires_grad_(False)
        self.module.train(not eval_mode)
        if hasattr(self.module, "set_grad_checkpointing"):
            self.module.set_grad_checkpointing(False)  # nothing to recompute without gradients
        names = [name for name, _ in self.module.named_parameters()]
        own = list(self.module.parameters())
        self._half_names = [n for n, p in zip(names, own, strict=True) if p.dtype in _HALF]
        self._half = [p for p in own if p.dtype in _HALF]
        self._masters = [p.float() for p in self._half]
        masters = iter(self._masters)
        self._averages = [next(masters) if p.dtype in _HALF else p for p in own]
        self._source: nn.Module | None = None
        self._source_params: list[Tensor] = []

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the teacher towards ``model``: one fused call for all parameters.

        Raises:
            ValueError: if the parameters of ``model`` are not those the teacher was made from.
        """
        if model is not self._source:
            self._bind(model)
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        source = self._source_params
        if self._half:
            source = [s.float() if s.dtype in _HALF else s for s in source]
        torch._foreach_lerp_(self._averages, source, 1.0 - decay)
        if self._half:
            torch._foreach_copy_(self._half, self._masters)
        if self.eval_mode:
            student = dict(unwrap(model).named_buffers())
            for name, buffer in self.module.named_buffers():
                buffer.copy_(student[name])

    def _bind(self, model: nn.Module) -> None:
        own = {name: p.shape for name, p in self.module.named_parameters()}
        theirs = {name: p.shape for name, p in unwrap(model).named_parameters()}
        if own != theirs:
            wrong = sorted(n for n in own.keys() | theirs.keys() if own.get(n) != theirs.get(n))
            raise ValueError(
                f"the model does not fit the teacher: {len(wrong)} parameters differ, first "
                f"{wrong[0]!r} (teacher {own.get(wrong[0])}, model {theirs.get(wrong[0])})"
            )
        self._source = model
        self._source_params = list(unwrap(model).parameters())

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact continuation needs: weights, counter, float32 masters of half weights."""
        return {
            "module": self.module.state_dict(),
            "num_updates": self.num_updates,
            "masters": dict(zip(self._half_names, self._masters, strict=True)),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; raises RuntimeError if it does not fit."""
        self.module.load_state_dict(state["module"])
        self.num_updates = int(state["num_updates"])
        saved = state["masters"]
        for name, master, half in zip(self._half_names, self._masters, self._half, strict=True):
            master.copy_(saved.get(name, half))
