"""What a checkpoint holds besides open_clip's own: ``checkpoint["optimizer"]["otter"]``.

The entry hangs on torch's optimizer hooks, and stock open_clip ignores it: the second scale s_d is taken
out of the saved groups, so that its ``optimizer.load_state_dict`` fits.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from otter_openclip.losses import MAX_LOG_SCALE
from otter_openclip.training.arguments import settings

KEY = "otter"


def saved_entry(optimizer_state: dict[str, Any], args: Namespace) -> dict[str, Any]:
    """The entry of a resumed checkpoint's optimizer state, {} if it has none; warns of changes."""
    saved = optimizer_state.get(KEY)
    if saved is None:
        logging.warning(
            "The resumed checkpoint was not written with this plugin's losses: the teacher starts as a "
            "copy of the student and the distillation scale from its initial value."
        )
        return {}
    then, now = saved["settings"], settings(args)
    changed = [
        f"{name}: {then.get(name, 'unset')} -> {now.get(name, 'unset')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if changed:
        logging.warning(f"Resuming with other settings than before: {', '.join(changed)}")
    return saved


def add_entry(
    optimizer: torch.optim.Optimizer,
    args: Namespace,
    scale: nn.Parameter | None,
    more: Callable[[], dict[str, Any]],
) -> None:
    """Make ``optimizer.state_dict()`` end in the entry: settings, s_d with its state, and ``more()``.

    ``scale``, if any, must be alone in the optimizer's last group, as :func:`add_scale` puts it.
    """

    def hook(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        entry: dict[str, Any] = {"settings": settings(args)}
        if scale is not None:
            *groups, group = state["param_groups"]
            (index,) = group["params"]
            entry["distill_logit_scale"] = scale.detach()
            entry["distill_logit_scale_group"] = group
            entry["distill_logit_scale_state"] = state["state"].get(index)
            kept = {k: v for k, v in state["state"].items() if k != index}
            state = state | {"param_groups": groups, "state": kept}
        return state | {KEY: entry | more()}

    optimizer.register_state_dict_post_hook(hook)


def load_entry(
    optimizer: torch.optim.Optimizer,
    args: Namespace,
    scale: nn.Parameter | None,
    load_more: Callable[[dict[str, Any]], None],
) -> None:
    """The inverse of :func:`add_entry`, for an optimizer that has ``scale`` when it loads.

    ``optimizer.load_state_dict`` then restores s_d and its state, and hands the entry to ``load_more``;
    a state without an entry loads too, s_d then starts anew. It raises ValueError if the state's groups
    are not this optimizer's.
    """

    def hook(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        entry = saved_entry(state, args)
        own, saved = (
            [len(group["params"]) for group in groups]
            for groups in (optimizer.param_groups, state["param_groups"])
        )
        if saved != (own if scale is None else own[:-1]):
            raise ValueError(
                f"the checkpoint's optimizer has groups of {saved} parameters, this run's of {own}: it "
                "was written under another major version of open_clip or with other flags; "
                "start from its weights instead, with --pretrained in place of --resume"
            )
        load_more(entry)
        if scale is None:
            return state
        index = sum(saved)
        group = {k: v for k, v in optimizer.param_groups[-1].items() if k != "params"}
        group = entry.get("distill_logit_scale_group", group) | {"params": [index]}
        moments = entry.get("distill_logit_scale_state")
        if "distill_logit_scale" in entry:
            with torch.no_grad():
                scale.copy_(entry["distill_logit_scale"])
        return state | {
            "param_groups": [*state["param_groups"], group],
            "state": state["state"] | ({} if moments is None else {index: moments}),
        }

    optimizer.register_load_state_dict_pre_hook(hook)


def add_scale(optimizer: torch.optim.Optimizer, scale: nn.Parameter, args: Namespace) -> None:
    """Let ``optimizer`` learn the log of s_d, last in its groups.

    Its gradient is averaged over ranks and micro-batches, and it stays in [0, log 100].
    """
    optimizer.add_param_group({"params": [scale], "weight_decay": 0.0})

    def clamp(*_: Any) -> None:
        with torch.no_grad():
            scale.clamp_(0.0, MAX_LOG_SCALE)  # as open_clip's loop does with logit_scale

    optimizer.register_step_post_hook(clamp)

    def average(gradient: Tensor) -> Tensor:
        # Not one of the model's parameters, so DDP does not see it; and with accumulation the whole
        # batch's loss is differentiated once for each micro-batch.
        gradient = gradient / (args.world_size * args.accum_freq)
        if args.world_size > 1:
            dist.all_reduce(gradient)
        return gradient

    scale.register_hook(average)
