"""Turn the reference's checkpoint into a folder for open_clip; ``convert_command`` has the flags."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from otter_openclip.checkpoints.contents import read_file
from otter_openclip.model_folders.assembly import build_model, read_tokenizer
from otter_openclip.model_folders.folder import check_out, check_state, load_model, write_folder
from otter_openclip.untrusted import no_code_from_files

# models/model_factory.py of the reference
TEXT_TOWERS = {
    "declutr-small": "johngiorgi/declutr-small",
    "declutr-base": "johngiorgi/declutr-base",
    "declutr-sci-base": "johngiorgi/declutr-sci-base",
    "sentence-transformer-base": "sentence-transformers/bert-base-nli-mean-tokens",
    "sentence-transformer-large": "sentence-transformers/bert-large-nli-mean-tokens",
}
# train.py of the reference
DEFAULT_ARGS = {"image_arch": "resnet50", "text_arch": "declutr-sci-base", "max_token_length": 60}
IMAGE_SIZE = 224
MAX_LOG_SCALE = math.log(100.0)
BIAS_TOLERANCE = 1e-5  # of the text projection's bias, when another tensor has taken it over

_LAST_NORM = re.compile(r"text_encoder\.model\.encoder\.layer\.(\d+)\.output\.LayerNorm\.bias")
_SCALES = ("contrastive_loss.loss.T", "contrastive_loss.T")
# Buffers of transformers 4.3 that are now computed, and BERT's pooler, which the reference never calls.
_UNUSED = ("embeddings.position_ids", "embeddings.token_type_ids", "pooler.")


@no_code_from_files()
def convert_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    weights: str = "student",
    text_model: str | None = None,
    overwrite: bool = False,
    report: Callable[[str], None] = logging.info,
) -> Path:
    """Write the reference's ``checkpoint`` as a folder for stock open_clip and verify it.

    Read are a plain model and one with ``student.``, ``teacher.`` and ``dist_loss`` keys, with or
    without DataParallel's ``module.``; ``T`` of both its loss modules; and what transformers 4.3 saved
    (``position_ids``, the pooler). The contrastive ``T`` becomes ``logit_scale``, limited to
    [0, log 100] as the reference limits it in its forward; the distillation's ``T_s`` is training state
    and is left out. The bias of a text projection goes into the text tower's last layer norm.

    Args:
        checkpoint: ``last.pth.tar`` or ``best.pth.tar``; read with ``weights_only=True``.
        out: folder to write. It appears complete or not at all.
        weights: "student", or "teacher" for the EMA teacher.
        text_model: Hugging Face name of the text tower, or a folder with its ``config.json`` and
            tokenizer; by default the one that belongs to the stored ``text_arch``.
        overwrite: replace ``out`` if it is an earlier export.
        report: called with lines that say what is read as what.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        FileExistsError: if ``out`` exists and is not to be overwritten.
        ValueError: if the file is not the reference's, open_clip cannot express its architecture (a
            text projection with a bias and more outputs than inputs), or the text tower does not fit or
            cannot be read.
        RuntimeError: if what open_clip loads from the written folder is not what the checkpoint has.
    """
    path, out = Path(checkpoint), Path(out)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; give the reference's last.pth.tar")
    check_out(out, overwrite, path)
    contents = read_file(path)
    args = _stored_args(contents, path)
    state = _select(contents, path, weights)
    text_model = _text_model(text_model, args["text_arch"])
    state = _without_projection_bias(state, path, report)
    config = _config(args, state, text_model, path)
    report(
        f"Converting the {weights} of {path}: {args['image_arch']} + {text_model}, "
        f"{config['embed_dim']} dimensions"
    )
    state = _rename(state)
    model = build_model(config)
    load_model(
        model,
        state,
        f"{path} does not fit {args['image_arch']} + {text_model}",
        "Pass --text-model with the name or folder of the text tower it was trained with",
    )
    tokenizer = read_tokenizer(text_model, args["max_token_length"], model.vocab_size)
    write_folder(out, model, config, state, tokenizer)
    return out


def _stored_args(contents: Mapping[str, Any], path: Path) -> dict[str, Any]:
    args = contents.get("args")
    if not isinstance(args, Mapping):
        shown = ", ".join(f"{key} {value}" for key, value in DEFAULT_ARGS.items())
        logging.warning(f"{path} has no args; assuming the reference's defaults: {shown}")
        args = {}
    return {**DEFAULT_ARGS, **args}


def _select(contents: Mapping[str, Any], path: Path, weights: str) -> dict[str, Tensor]:
    """The state of ``weights``: keys of an ``ImageTextModel`` of the reference."""
    state = check_state(contents.get("state_dict", contents), path, weights)
    # DataParallel around the whole or one of the towers.
    state = {".".join(p for p in key.split(".") if p != "module"): v for key, v in state.items()}
    distilled = any(key.startswith("student.") for key in state)
    if weights == "teacher" and not any(key.startswith("teacher.") for key in state):
        raise ValueError(
            f"{path} has no teacher: only the reference's runs with --ema_distill keep one; use "
            "--weights student"
        )
    if distilled:
        prefix = f"{weights}."
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not any(key.startswith("image_encoder.model.") for key in state):
        raise ValueError(
            f"{path} is not a checkpoint of facebookresearch/OTTER (no image_encoder.model in it); "
            "for one of open_clip or this package use otter-openclip export"
        )
    return state


def _text_model(text_model: str | None, text_arch: str) -> str:
    text_model = text_model or TEXT_TOWERS.get(text_arch)
    if text_model is None:
        raise ValueError(
            f"the checkpoint's text_arch {text_arch!r} is none of the reference's; pass --text-model "
            "NAME_OR_DIR"
        )
    return str(Path(text_model).resolve()) if Path(text_model).is_dir() else text_model


def _without_projection_bias(
    state: dict[str, Tensor], path: Path, report: Callable[[str], None]
) -> dict[str, Tensor]:
    """``state`` with the same text features and no bias in the text projection W (D x width).

    open_clip's Hugging Face tower averages the last hidden states h over the tokens and projects without
    bias. Both are linear, so W mean(h) + c = W mean(h + d) where W d = c. BERT's and RoBERTa's h is the
    output of a layer norm, whose bias takes d, the shortest solution. ValueError if there is no such d
    to float32's precision, or no such layer norm.
    """
    state = dict(state)
    bias = state.pop("text_encoder.fc.bias", None)
    if bias is None or not bias.any():
        return state
    weight, bias = state["text_encoder.fc.weight"].double(), bias.double()
    norms = [match for match in map(_LAST_NORM.fullmatch, state) if match]
    if norms:
        key = max(norms, key=lambda match: int(match[1]))[0]
        before = state[key]
        state[key] = (before.double() + torch.linalg.pinv(weight) @ bias).to(before.dtype)
        error = weight @ (state[key].double() - before.double()) - bias
        if error.norm() <= BIAS_TOLERANCE * bias.norm():
            report(
                f"The bias of its text projection is now part of {key}: open_clip's projections "
                "have none"
            )
            return state
    raise ValueError(
        f"{path} cannot be converted: its text projection has a bias, open_clip has none, and the last "
        "layer norm of its text tower cannot take it over: that needs a tower of BERT's kind, at least "
        "as wide as the embedding, and a projection of full rank"
    )


def _config(
    args: Mapping[str, Any], state: Mapping[str, Tensor], text_model: str, path: Path
) -> dict[str, Any]:
    """open_clip's model configuration, from the stored args."""
    head = state.get("image_encoder.model.fc.weight")
    if head is None:
        raise ValueError(f"{path} cannot be converted: its image tower has no fc head")
    return {
        "embed_dim": len(head),
        "vision_cfg": {
            "timm_model_name": args["image_arch"],
            "timm_model_pretrained": False,
            # Average pooling and timm's own classifier, resized, as the projection with bias.
            "timm_pool": "avg",
            "timm_proj": "",
            "image_size": IMAGE_SIZE,
        },
        "text_cfg": {
            "hf_model_name": text_model,
            "hf_tokenizer_name": text_model,
            "hf_model_pretrained": False,
            # The reference projects, then averages over tokens: the order makes no difference.
            "hf_proj_type": "linear" if "text_encoder.fc.weight" in state else None,
            "hf_pooler_type": "mean_pooler",
            "context_length": args["max_token_length"],
        },
    }


def _rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under the names of open_clip's ``CustomTextCLIP``; names that are unknown stay."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("text_encoder.model.")
        if key.startswith("image_encoder.model."):
            renamed["visual.trunk." + key.removeprefix("image_encoder.model.")] = value
        elif name != key and not name.startswith(_UNUSED):
            renamed["text.transformer." + name] = value
        elif key == "text_encoder.fc.weight":
            renamed["text.proj.weight"] = value
        elif key in _SCALES:
            # The reference limits it in the forward, open_clip's loop after each step.
            renamed["logit_scale"] = value.reshape(()).clamp(0.0, MAX_LOG_SCALE)
        elif name == key:
            renamed[key] = value
    return renamed
