"""``--lock-image-freeze-bn-stats``: locked batch norm stays in eval mode, also of half-locked towers.

open_clip replaces every batch norm by a plain frozen one. That drops the activation of timm's
BatchNormAct2d (EfficientNet's, MobileNet's and RegNet's outputs are off by orders of magnitude) and
``num_batches_tracked``: the checkpoint no longer fits its own model. Eval mode gives what is meant.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.utils import unwrap_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def leave_batch_norm(model: nn.Module) -> None:
    """Let ``model``, whose image tower ``watch.check_locks`` has locked, not be locked again."""
    model.lock_image_tower = _nothing


def _nothing(**_: Any) -> None:
    """In place of what would replace modules."""


def locked_batch_norms(model: nn.Module) -> list[str]:
    """Names of the image tower's batch norms whose parameters are locked."""
    visual = unwrap_model(model).visual
    return [
        f"visual.{name}"
        for name, module in visual.named_modules()
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters())
    ]


def keep_in_eval_mode(model: nn.Module, names: Iterable[str]) -> None:
    """Put the modules ``names`` of ``model`` into eval mode: after every ``train()``."""
    model = unwrap_model(model)
    for name in names:
        model.get_submodule(name).eval()
