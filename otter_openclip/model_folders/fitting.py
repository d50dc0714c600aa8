"""Weights of a file under the names of the module they are for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from timm.layers import BatchNormAct2d
from torch import Tensor, nn

_COUNTER = "num_batches_tracked"  # older files have none; nothing but training reads it
# What each kind of tensor is called everywhere: weight and bias of a norm have the same shape.
_KINDS = ("weight", "bias", "running_mean", "running_var", _COUNTER)
# Not weights, or of a text tower's part that is not asked for.
_UNUSED = ("position_ids", "token_type_ids", "pooler.dense.weight", "pooler.dense.bias")

State = Mapping[str, Tensor]


def fit_by_name(given: State, own: State, needed: Collection[str]) -> dict[str, Tensor] | None:
    """The ``needed`` ones of ``own`` from ``given``; None unless all are there and there are no others.

    ``given`` may have all names behind one prefix (``bert.``); what lies outside of it is ignored, as
    are tensors of ``own`` that are not needed (a classifier).
    """
    given = _behind_prefix(given, needed)
    if _wrong_names(given, own, needed):
        return None
    return {key: _as(given.get(key, own[key]), own[key]) for key in needed}


def fit_by_order(given: State, own: State) -> dict[str, Tensor] | None:
    """``given`` under the names of ``own``; None unless shapes and kinds match one to one, in order."""
    names = list(own)
    if not any(key.endswith(_COUNTER) for key in given):
        names = [key for key in own if not key.endswith(_COUNTER)]
    if _first_wrong(given, own, names) is not None:
        return None
    fitting = dict(zip(names, given.values(), strict=True))
    return {key: _as(fitting.get(key, value), value) for key, value in own.items()}


def numbered(given: State) -> dict[str, Tensor] | None:
    """``given`` in the order of a number that its names carry; None if there is none.

    The order of .safetensors is that of types and names, so of those only such a number can be trusted.
    """
    numbers = {key: re.search(r"\d+", key) for key in given}
    order = {key: int(number[0]) for key, number in numbers.items() if number}
    if len(set(order.values())) < len(given):
        return None
    return {key: given[key] for key in sorted(order, key=order.__getitem__)}


def with_counters(given: State, model: nn.Module) -> dict[str, Tensor]:
    """``given`` with the counters of ``model``'s batch norms, if just these are missing.

    open_clip's --lock-image-freeze-bn-stats saves none.

    Raises:
        ValueError: if they are missing of batch norms whose activation that flag has dropped.
    """
    own = model.state_dict()
    missing = [key for key in own if key.endswith(_COUNTER) and key not in given]
    if {key for key in own if key not in given} > set(missing):
        return dict(given)
    acting = {name for name, module in model.named_modules() if isinstance(module, BatchNormAct2d)}
    for key in missing:
        if (name := key.removesuffix(f".{_COUNTER}")) in acting:
            raise ValueError(
                f"{key} is missing: open_clip's --lock-image-freeze-bn-stats was used with --loss clip, "
                f"which drops the activation of {name}, so that no model that open_clip builds gives "
                "what was trained. Train without that flag, or with --loss infonce or --feature-cache"
            )
    return {**given, **{key: own[key] for key in missing}}


def misfit(given: State, own: State, needed: Collection[str], ordered: State | None = None) -> str:
    """What does not fit, for an error: by name if any name fits, else in order if ``ordered``."""
    inside = _behind_prefix(given, needed)
    if any(key in inside for key in needed):
        wrong = _wrong_names(inside, own, needed)
        return "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    text = f"of its {len(given)} tensors none has a name of the tower, like {next(iter(needed))}"
    first = _first_wrong(ordered, own, list(own)) if ordered is not None else None
    return f"{text}, and in order {first}" if first else text


def _behind_prefix(given: State, needed: Collection[str]) -> dict[str, Tensor]:
    first = next(iter(needed))
    prefixes = {key[: -len(first)] for key in given if f".{key}".endswith(f".{first}")} | {""}
    prefix = max(sorted(prefixes), key=lambda p: sum(p + key in given for key in needed))
    return {key.removeprefix(prefix): v for key, v in given.items() if key.startswith(prefix)}


def _wrong_names(given: State, own: State, needed: Collection[str]) -> list[str]:
    wrong = [f"{k} is missing" for k in needed if k not in given and not k.endswith(_COUNTER)]
    wrong += [
        f"{key} is {tuple(given[key].shape)}, the tower's {tuple(own[key].shape)}"
        for key in needed
        if key in given and given[key].shape != own[key].shape
    ]
    wrong += [f"{k} is not the tower's" for k in given if k not in own and not k.endswith(_UNUSED)]
    return wrong


def _first_wrong(given: State, own: State, names: list[str]) -> str | None:
    """The first of ``names`` that the tensor at its place in ``given`` does not fit."""
    for (key, value), name in zip(given.items(), names, strict=False):
        if value.shape != own[name].shape:
            shapes = f"{tuple(value.shape)} for {tuple(own[name].shape)}"
            return f"{key} does not fit {name} ({shapes})"
        kinds = [text.rsplit(".", 1)[-1] for text in (key, name)]
        if kinds[0] != kinds[1] and set(kinds) <= set(_KINDS):
            return f"{key} does not fit {name}"
    if len(given) > len(names):
        return f"{list(given)[len(names)]} is one too many"
    return f"nothing is left for {names[len(given)]}" if len(given) < len(names) else None


def _as(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype)
