"""s_d, the distillation term's own scale, in open_clip's optimizer and in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from otter_openclip.losses import MAX_LOG_SCALE

SCALE = "distill_logit_scale"


def add_scale(optimizer: torch.optim.Optimizer, scale: nn.Parameter, accum_freq: int) -> None:
    """Let ``optimizer`` learn the log of s_d, last in its groups; its ``state_dict`` does not show it.

    It stays in [0, log 100]. With accumulation the whole batch's loss is differentiated once for each
    micro-batch, so its gradient is divided by ``accum_freq``.
    """
    optimizer.add_param_group({"params": [scale], "weight_decay": 0.0})

    def hide(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        *groups, group = state["param_groups"]  # so that stock open_clip can resume
        shown = {k: v for k, v in state["state"].items() if k not in group["params"]}
        return state | {"param_groups": groups, "state": shown}

    def clamp(*_: Any) -> None:
        with torch.no_grad():
            scale.clamp_(0.0, MAX_LOG_SCALE)  # as open_clip's loop does with logit_scale

    optimizer.register_state_dict_post_hook(hide)
    optimizer.register_step_post_hook(clamp)
    if accum_freq > 1:
        scale.register_hook(lambda gradient: gradient / accum_freq)


def scale_state(optimizer: torch.optim.Optimizer, scale: nn.Parameter) -> dict[str, Any]:
    """Its value, and what the optimizer knows of it: entries of a checkpoint."""
    group = {k: v for k, v in optimizer.param_groups[-1].items() if k != "params"}
    state = optimizer.state.get(scale)
    return {SCALE: scale.detach(), f"{SCALE}_group": group, f"{SCALE}_state": state}


@torch.no_grad()
def restore_scale(
    entry: Mapping[str, Any], optimizer: torch.optim.Optimizer, scale: nn.Parameter
) -> None:
    """Take up what :func:`scale_state` gave, if it is in ``entry``."""
    if SCALE not in entry:
        return
    scale.copy_(entry[SCALE])
    group = optimizer.param_groups[-1]
    group.update(entry[f"{SCALE}_group"])
    on_device = group.get("fused") or group.get("capturable")  # as torch keeps the step count
    for name, value in (entry[f"{SCALE}_state"] or {}).items():
        moved = isinstance(value, Tensor) and (name != "step" or on_device)
        optimizer.state[scale][name] = value.to(scale.device) if moved else value
