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
    """Let the next ``model.lock_image_tower`` replace no module, whatever ``freeze_bn_stats`` says."""
    stock = model.lock_image_tower

    def lock(**keywords: Any) -> None:
        del model.lock_image_tower  # the class's again: a copy of the model must not hold this one
        stock(**keywords | {"freeze_bn_stats": False})

    model.lock_image_tower = lock


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
