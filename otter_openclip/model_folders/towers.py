"""Put two pretrained towers together into one model; ``towers_command`` has the flags."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from otter_openclip.model_folders.assembly import (
    build_model,
    load_text_tower,
    read_tokenizer,
    read_trunk,
    text_config,
)
from otter_openclip.model_folders.folder import check_out, write_folder
from otter_openclip.model_folders.modules import check_features, follow_modules
from otter_openclip.model_folders.towers_command import CONTEXT_LENGTH, POOLERS
from otter_openclip.preprocessing import size_pair
from otter_openclip.untrusted import no_code_from_files

# Of timm's crop_mode.
_RESIZE_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}
# Text towers whose positions begin behind that of the padding.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta")


@no_code_from_files()
def make_towers(
    out: str | Path,
    *,
    image: str,
    text: str | Path,
    image_weights: str | Path | None = None,
    text_weights: str | Path | None = None,
    text_pooler: str | None = None,
    embed_dim: int | None = None,
    image_head: str = "linear",
    text_head: str = "linear",
    image_size: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_interpolation: str | None = None,
    context_length: int | None = None,
    init_logit_scale: float = 3.9,
    seed: int = 0,
    overwrite: bool = False,
    report: Callable[[str], None] = logging.info,
) -> Path:
    """Write the two towers as a folder for stock open_clip and compare what it loads from there.

    Args:
        out: folder to write. It appears complete or not at all.
        image: timm's name of the image tower; its weights come from the hub (or its cache) unless
            ``image_weights`` is given.
        text: Hugging Face name of the text tower, or a folder with its config.json, tokenizer and,
            unless ``text_weights`` is given, weights.
        image_weights: state_dict with timm's names, or with other names in timm's order (which
            .safetensors do not keep: there the names must carry it as a number); with or without the
            classifier, which is left out.
        text_weights: state_dict with the names of transformers.
        text_pooler: "mean" over the tokens, "cls" the first token, "own" the tower's own pooler; by
            default what sentence-transformers' modules.json says, or "mean" without one.
        embed_dim: width of the embedding; by default the text tower's.
        image_head, text_head: "linear" (no bias), the identity between equal widths, or "mlp".
        image_size, image_mean, image_std, image_interpolation: by default the pretrained tower's.
        context_length: tokens per text; by default 77, or what the text tower takes if that is fewer.
        init_logit_scale: log of the scale training starts from.
        seed: of the heads that are drawn.
        overwrite: replace ``out`` if it is an earlier export.
        report: called with lines that say what is put together.

    Returns:
        The folder.

    Raises:
        FileExistsError: if ``out`` exists and is not to be overwritten.
        ValueError: if a tower, its weights or a setting cannot be used, or stock open_clip cannot
            express the whole.
        RuntimeError: if what open_clip loads from the written folder is not what was put together.
    """
    out, text = Path(out), str(text)
    image = image.removeprefix("hf-hub:").removeprefix("timm/")
    inputs = [Path(name) for name in (image_weights, text_weights, text) if name is not None]
    check_out(out, overwrite, *filter(Path.exists, inputs))
    text, text_pooler = follow_modules(text, text_pooler)
    text, hf_config, width = text_config(text)
    embed_dim = embed_dim or width
    context_length = _context_length(context_length, text, hf_config)
    trunk = read_trunk(image, image_weights)
    preprocess = _preprocessing(trunk, image_mean, image_std, image_interpolation)
    size = image_size or _plain_size(trunk)
    images, features = _image_features(trunk, image, size)
    config = {
        "embed_dim": embed_dim,
        "init_logit_scale": init_logit_scale,
        "vision_cfg": {
            "timm_model_name": image,
            "timm_model_pretrained": False,
            "timm_pool": "",  # the tower's own
            "timm_proj": image_head,
            "image_size": size,
        },
        "text_cfg": {
            "hf_model_name": text,
            "hf_tokenizer_name": text,
            "hf_model_pretrained": False,
            "hf_proj_type": text_head,
            "hf_pooler_type": POOLERS[text_pooler],
            "context_length": context_length,
        },
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config, preprocess)
    tokenizer = read_tokenizer(text, context_length, model.vocab_size)
    model.visual.trunk.load_state_dict(trunk.state_dict())
    transformer = model.text.transformer
    if text_pooler == "own" and getattr(transformer, "pooler", None) is None:
        raise ValueError(f"{text} has no pooler of its own; use --text-pooler mean or cls")
    load_text_tower(transformer, text, text_weights, text_pooler)
    check_features(model.text, tokenizer, text, text_pooler)
    if image_head == "linear" and features.shape[1] == embed_dim:
        nn.init.eye_(model.visual.head.proj.weight)
    if text_head == "linear" and width == embed_dim:
        nn.init.eye_(model.text.proj.weight)
    with torch.no_grad():
        if not torch.allclose(model.visual.trunk(images), features, rtol=1e-4, atol=1e-5):
            raise ValueError(f"open_clip pools {image} in another way than timm; use another tower")
    report(
        f"{image} ({features.shape[1]} wide, head {image_head}) + {text} ({width}, {text_pooler}, head "
        f"{text_head}): {embed_dim} dimensions"
    )
    report(f"Images of {size} px, {preprocess}; texts of {context_length} tokens")
    write_folder(out, model, config, model.state_dict(), tokenizer)
    return out


def _context_length(length: int | None, text: str, config: PretrainedConfig) -> int:
    """``length``, or else open_clip's 77 or as many tokens as the text tower takes."""
    most = getattr(config, "max_position_embeddings", None) or math.inf
    if config.model_type in _OFFSET_POSITIONS:
        most -= (config.pad_token_id or 0) + 1
    if length is not None and length > most:
        raise ValueError(
            f"context_length {length} is more than the {most} tokens that {text} takes"
        )
    return length or min(CONTEXT_LENGTH, most)


def _preprocessing(
    trunk: nn.Module,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    interpolation: str | None,
) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg``: the arguments, or else what the tower was trained with."""
    trained = trunk.pretrained_cfg
    return {
        "mean": list(mean or trained["mean"]),
        "std": list(std or trained["std"]),
        "interpolation": interpolation or trained["interpolation"],
        "resize_mode": _RESIZE_MODES.get(trained.get("crop_mode") or "center", "shortest"),
    }


def _plain_size(trunk: nn.Module) -> int | list[int]:
    """The image size that the trunk was trained with: one number for squares."""
    height, width = trunk.pretrained_cfg["input_size"][1:]
    return height if height == width else [height, width]


@torch.no_grad()
def _image_features(trunk: nn.Module, image: str, size: int | list[int]) -> tuple[Tensor, Tensor]:
    """A made-up image (1, 3, H, W) and the trunk's pooled features of it (1, width)."""
    height, width = size_pair(size)
    images = torch.linspace(-1, 1, 3 * height * width).reshape(1, 3, height, width)
    try:
        features = trunk(images)
    except Exception as error:  # Each architecture has its own.
        raise ValueError(
            f"{image} cannot take images of {size} px ({error}); open_clip builds it at its own size, "
            f"{_plain_size(trunk)} px"
        ) from error
    if features.ndim != 2 or features.shape[1] != trunk.num_features:
        raise ValueError(
            f"open_clip's heads take {trunk.num_features} features of {image}, but it gives "
            f"{tuple(features.shape[1:])}; use another image tower"
        )
    return images, features
