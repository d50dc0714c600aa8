"""Class features kept on disk, under a digest of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from otter_openclip.evaluation.classifier import Autocast, class_features, warn_about_cut_prompts
from otter_openclip.files import written_whole

NAME = "class_features"
VERSION = 3  # of how they are computed


def cached_class_features(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    prompts: Sequence[Sequence[str]],
    *,
    device: str | torch.device,
    autocast: Autocast = nullcontext,
    folder: Path | None,
) -> Tensor:
    """``class_features``, read from ``folder`` if they are there, else computed and kept there.

    The file's name is a digest of everything they depend on: weights and structure of the model,
    tokens, prompts in their order, precision. A file that is damaged is computed anew.
    """
    tokens = warn_about_cut_prompts(tokenizer, prompts)
    path = None
    if folder is not None:
        with autocast():
            key = _key(model, tokens, prompts, torch.device(device).type)
        path = folder / f"{key}.safetensors"
        if path.is_file() and (features := _read(path, key)) is not None:
            return features.to(device)
    features = class_features(
        model, tokenizer, prompts, device=device, autocast=autocast, progress=True
    )
    if path is not None:
        _write(path, key, features.cpu())
    return features


def _key(model: nn.Module, tokens: Tensor, prompts: Any, kind: str) -> str:
    half = torch.is_autocast_enabled(kind)
    precision = str(torch.get_autocast_dtype(kind)) if half else "full"
    digest = hashlib.sha256(f"{VERSION} {kind} {precision}\n{model}\n".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    digest.update(_bytes(tokens))
    digest.update(json.dumps(prompts).encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _seal(key: str, features: Tensor) -> dict[str, str]:
    return {"sha256": hashlib.sha256(key.encode() + _bytes(features)).hexdigest()}


def _read(path: Path, key: str) -> Tensor | None:
    try:
        with safe_open(path, "pt") as file:
            metadata, features = file.metadata(), file.get_tensor(NAME)
    except (SafetensorError, OSError) as error:
        reason = str(error)
    else:
        if metadata == _seal(key, features):
            return features
        reason = "its contents do not match its digest"
    logging.warning(f"Class features in {path} are damaged ({reason}); computing them again")
    return None


def _write(path: Path, key: str, features: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(save({NAME: features.contiguous()}, metadata=_seal(key, features)))
    except OSError as error:  # a cache that cannot be written is no reason to lose the result
        logging.warning(f"Class features could not be kept in {path.parent}: {error}")
