"""Text towers of sentence-transformers: what comes behind the transformer, and what all of it gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import HfHubHTTPError, HFValidationError
from torch import nn

_POOLERS = {"cls_token": "cls", "mean_tokens": "mean"}
_PROBES = ("a photo of a cat.", "Two Dogs and a Red Circle", "square")


def follow_modules(text: str, pooler: str | None) -> tuple[str, str]:
    """Name or folder of the transformer that a text tower begins with, and how the tower pools.

    A ``pooler`` that is given takes the transformer alone. Without a modules.json it is the mean.
    ValueError if stock open_clip cannot express what the modules do.
    """
    try:
        if (modules := _read(text, "modules.json")) is None:
            return text, pooler or "mean"
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        settings = _read(text, "config_sentence_transformers.json") or {}
        kinds += ["a prompt before each text"] if settings.get("default_prompt_name") else []
        start, *places = (module["path"] for module in modules)
        poolings = _read(text, f"{places[0]}/config.json") if "Pooling" in kinds[1:2] else {}
        # Newer folders name it, older ones have a switch for each.
        modes = [poolings["pooling_mode"]] if "pooling_mode" in poolings else []
        modes += [
            key for key, on in poolings.items() if key.startswith("pooling_mode_") and on is True
        ]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"the modules.json of {text} or a file it names is broken: {error}"
        ) from error
    if start and Path(text).is_dir():
        text = str(Path(text, start))
    if pooler is not None:
        return text, pooler
    parts = [kind for kind in kinds if kind != "Normalize"]  # which open_clip does itself
    known = [_POOLERS.get(mode.removeprefix("pooling_mode_"), mode) for mode in modes]
    if parts != ["Transformer", "Pooling"] or known not in (["cls"], ["mean"]):
        raise ValueError(
            f"{text} consists of {', '.join(parts)}, pooling by {' and '.join(known) or 'nothing'}; "
            "open_clip takes Transformer, Pooling by cls or mean; --text-pooler drops all but the first"
        )
    return text, known[0]


def _read(text: str, name: str) -> Any:
    """The JSON of a file of a tower; None if it has none of that name."""
    try:
        path = Path(text, name) if Path(text).is_dir() else Path(hf_hub_download(text, name))
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, HfHubHTTPError, HFValidationError):
        return None  # whether there is such a tower at all, transformers will say


@torch.no_grad()
def check_features(tower: nn.Module, tokenizer: Any, text: str, pooler: str) -> None:
    """Raise ValueError if open_clip's ``tower`` gives other features than its makers' code.

    That takes each text as it is, where open_clip pads it, masks by token and pools. Both through the
    tower's projection.
    """
    for probe in _PROBES:
        tokens = tokenizer.tokenizer(
            probe, truncation=True, max_length=tokenizer.context_length, return_tensors="pt"
        )
        output = tower.transformer(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        hidden = output.last_hidden_state
        features = output.pooler_output if pooler == "own" else hidden[:, 0]
        features = tower.proj(hidden.mean(1) if pooler == "mean" else features)
        if not torch.allclose(tower(tokenizer([probe])), features, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"open_clip pads, masks or pools texts in another way than {text} was made for, and "
                "would give other features; use another text tower"
            )
