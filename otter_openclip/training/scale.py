"""The plugin's part of a checkpoint (``checkpoints.layout``): made for a save, restored at a resume."""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from otter_openclip.losses import MAX_LOG_SCALE
from otter_openclip.teacher import EmaTeacher
from otter_openclip.training.flags import settings

SCALE = "distill_logit_scale"


def add_scale(optimizer: torch.optim.Optimizer, scale: nn.Parameter, args: Namespace) -> None:
    """Let ``optimizer`` learn the log of s_d, last in its groups; its ``state_dict`` does not show it.

    Its gradient is averaged over ranks and micro-batches, and it stays in [0, log 100].
    """
    optimizer.add_param_group({"params": [scale], "weight_decay": 0.0})

    def hide(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        *groups, group = state["param_groups"]  # so that stock open_clip can resume
        kept = {k: v for k, v in state["state"].items() if k not in group["params"]}
        return state | {"param_groups": groups, "state": kept}

    def clamp(*_: Any) -> None:
        with torch.no_grad():
            scale.clamp_(0.0, MAX_LOG_SCALE)  # as open_clip's loop does with logit_scale

    def average(gradient: Tensor) -> Tensor:
        # Not one of the model's parameters, so DDP does not see it; and with accumulation the whole
        # batch's loss is differentiated once for each micro-batch.
        gradient = gradient / (args.world_size * args.accum_freq)
        if args.world_size > 1:
            dist.all_reduce(gradient)
        return gradient

    optimizer.register_state_dict_post_hook(hide)
    optimizer.register_step_post_hook(clamp)
    scale.register_hook(average)


def make_entry(
    args: Namespace,
    optimizer: torch.optim.Optimizer,
    scale: nn.Parameter | None,
    ema: EmaTeacher | None,
) -> dict[str, Any]:
    """What a checkpoint has under ``otter``."""
    entry: dict[str, Any] = {"settings": settings(args)}
    if scale is not None:
        group = {k: v for k, v in optimizer.param_groups[-1].items() if k != "params"}
        entry |= {SCALE: scale.detach(), f"{SCALE}_group": group}
        entry[f"{SCALE}_state"] = optimizer.state.get(scale)
    if ema is not None:
        entry["teacher_state"] = ema.get_extra_state()
    return entry


@torch.no_grad()
def restore(
    entry: dict[str, Any] | None,
    teacher: dict[str, Tensor] | None,
    args: Namespace,
    optimizer: torch.optim.Optimizer,
    scale: nn.Parameter | None,
    ema: EmaTeacher | None,
) -> None:
    """The inverse, for a resumed checkpoint; warns of settings that are not what they were.

    Without an entry, of a run without this plugin, teacher and scale start anew, with a warning.
    """
    if entry is None:
        logging.warning(
            "The resumed checkpoint was not written with this plugin's losses: the teacher starts as a "
            "copy of the student and the distillation scale from its initial value."
        )
        return
    then, now = entry["settings"], settings(args)
    changed = [
        f"{name}: {then.get(name, 'unset')} -> {now.get(name, 'unset')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if changed:
        logging.warning(f"Resuming with other settings than before: {', '.join(changed)}")
    if scale is not None and SCALE in entry:
        scale.copy_(entry[SCALE])
        group = optimizer.param_groups[-1]
        group.update({k: v for k, v in entry[f"{SCALE}_group"].items() if k != "params"})
        on_device = group.get("fused") or group.get("capturable")  # as torch keeps the step count
        for name, value in (entry[f"{SCALE}_state"] or {}).items():
            moved = isinstance(value, Tensor) and (name != "step" or on_device)
            optimizer.state[scale][name] = value.to(scale.device) if moved else value
    if ema is not None and "teacher_state" in entry and teacher is not None:
        ema.module.load_state_dict(teacher)
        ema.set_extra_state(entry["teacher_state"])
