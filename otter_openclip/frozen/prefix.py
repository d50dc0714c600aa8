"""The frozen first part of a tower: in eval mode, without gradients, run once for student and teacher.

A prefix is a timm trunk under its head, a Hugging Face transformer with its pooling under its
projection, or a whole tower, of which every parameter is locked. ``install`` lets a model take its
output in place of images or tokens; what it is inputs tells them apart, so evaluation goes on as ever.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

# Of a model: its towers' attributes.
TOWERS = ("visual", "text")
_CPU_PIECE = 16  # images


def _is_locked(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(param.requires_grad for param in parameters)


def find_prefixes(model: nn.Module) -> dict[str, str]:
    """Tower -> name of its locked prefix, of a bare open_clip model; towers without one are left out.

    The text tower of an ``open_clip.CLIP`` is no module: ``--force-custom-text`` makes it one.
    """
    prefixes = {}
    for tower, part in inner_parts(model).items():
        locked = [name for name in (tower, part) if _is_locked(model.get_submodule(name))]
        if locked:
            prefixes[tower] = locked[0]
    return prefixes


def inner_parts(model: nn.Module) -> dict[str, str]:
    """Tower -> the name of its trunk or transformer, which open_clip locks, or of the whole tower."""
    parts = {}
    for tower in TOWERS:
        module = getattr(model, tower, None)
        if isinstance(module, nn.Module):
            inner = {TimmModel: "trunk", HFTextEncoder: "transformer"}.get(type(module))
            parts[tower] = tower if inner is None else f"{tower}.{inner}"
    return parts


def no_prefix_message(model: nn.Module, tower: str) -> str:
    """Why a locked ``tower`` of ``model`` has no prefix."""
    module = getattr(model, tower, None)
    name = {"visual": "image", "text": "text"}[tower]
    if not isinstance(module, nn.Module):
        return f"the {name} tower is not a module of its own; add --force-custom-text"
    trained = next((key for key, param in module.named_parameters() if param.requires_grad), None)
    return (
        f"what is frozen of the {name} tower is neither its whole trunk nor the tower: {trained} is "
        "trained; lock all of it"
    )


class _Whole:
    """A whole tower is the prefix."""

    def prefix(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs)

    def head_of(self, features: Tensor) -> Tensor:
        return features


class _TimmTrunk:
    """``open_clip.timm_model.TimmModel`` is a trunk, then a head."""

    def prefix(self, inputs: Tensor) -> Tensor:
        return self.trunk(inputs)

    def head_of(self, features: Tensor) -> Tensor:
        return self.head(features)


class _Transformer:
    """``open_clip.hf_model.HFTextEncoder`` is a transformer, a pooling, then a projection."""

    def prefix(self, inputs: Tensor) -> Tensor:
        mask = (inputs != self.config.pad_token_id).long()
        return self.pooler(self.transformer(input_ids=inputs, attention_mask=mask), mask)

    def head_of(self, features: Tensor) -> Tensor:
        return self.proj(features)


def is_output(inputs: Tensor) -> bool:
    """Whether it is a prefix's output: images have four dimensions, tokens are whole numbers."""
    return inputs.ndim != 4 and inputs.is_floating_point()


class _PassedBy:
    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_output(inputs):
            return self.head_of(inputs)
        return super().forward(inputs, *args, **kwargs)


def install(model: nn.Module, prefixes: dict[str, str]) -> None:
    """Let the towers of ``model`` take their prefix's output too; copies of the model do as well."""
    for tower, name in prefixes.items():
        module = getattr(model, tower)
        parts = {"trunk": _TimmTrunk, "transformer": _Transformer}
        part = parts.get(name.rpartition(".")[2], _Whole)
        bases = (_PassedBy, part, type(module))
        module.__class__ = type(type(module).__name__, bases, {"prefix_name": name})


def installed(model: nn.Module, tower: str) -> str | None:
    """The name of the prefix whose output the tower takes, None if it takes none's."""
    return getattr(getattr(model, tower, None), "prefix_name", None)


@torch.no_grad()
def run(model: nn.Module, tower: str, inputs: Tensor) -> Tensor:
    """(B, F) output of the tower's prefix for images or tokens; the prefix should be in eval mode."""
    prefix = getattr(model, tower).prefix
    if inputs.ndim == 4 and inputs.device.type == "cpu":
        # EfficientNet-Lite0 takes half the time in small pieces with the channels last.
        pieces = inputs.contiguous(memory_format=torch.channels_last).split(_CPU_PIECE)
        return torch.cat([prefix(piece) for piece in pieces])
    return prefix(inputs)


@contextlib.contextmanager
def shared(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """While active, a deep copy of ``model`` has the very modules ``names`` and no copies of them."""
    modules = [model.get_submodule(name) for name in names]

    def itself(module: nn.Module, _: Any) -> nn.Module:
        return module

    for module in modules:
        module.__deepcopy__ = functools.partial(itself, module)
    try:
        yield
    finally:
        for module in modules:
            del module.__deepcopy__
