"""Pretrained weights of the image tower and the text tower: read, and fitted or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from open_clip.hf_configs import arch_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils import logging as transformers_logging

from otter_openclip.checkpoints.contents import read_file
from otter_openclip.model_folders.fitting import fit_by_name, fit_by_order, misfit, numbered
from otter_openclip.model_folders.folder import check_state
from otter_openclip.model_folders.parts import unreadable


def read_trunk(image: str, weights: str | Path | None) -> nn.Module:
    """timm's tower without its classifier, pretrained, in eval mode."""
    try:
        trunk = timm.create_model(image, pretrained=weights is None)
    except Exception as error:  # files, network, no such tag, none published
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"timm has no weights of {image} at hand ({reason}); pass --image-weights FILE, or allow "
            "access to the Hugging Face hub"
        ) from error
    own = trunk.state_dict()
    trunk.reset_classifier(0)
    if weights is not None:
        given, path = _read_state(weights, "image tower"), Path(weights)
        needed = trunk.state_dict().keys()
        fitting = fit_by_name(given, own, needed)
        ordered = numbered(given) if path.suffix == ".safetensors" else given
        if fitting is None and ordered is not None:
            fitting = fit_by_order(ordered, own) or fit_by_order(ordered, trunk.state_dict())
        if fitting is None:
            hint = "" if ordered is not None else " (.safetensors keep no order: give it as .pt)"
            wrong = misfit(given, own, needed, ordered)
            raise ValueError(f"{path} does not fit {image}: {wrong}{hint}")
        trunk.load_state_dict({key: fitting[key] for key in needed})
    return trunk.eval()


def text_config(text: str) -> tuple[str, PretrainedConfig, int]:
    """Name (of a folder, the absolute path), configuration and width of the text tower."""
    if Path(text).is_dir():
        if not (Path(text) / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in the folder {text}, given as text")
        text = str(Path(text).resolve())
    try:
        config = AutoConfig.from_pretrained(text)
    except Exception as error:  # files, network, values of every wrong kind
        raise unreadable(text, "--text", error) from error
    if config.model_type not in arch_dict:
        raise ValueError(
            f"open_clip takes text towers of the kinds {', '.join(arch_dict)}, but {text} is a "
            f"{config.model_type}"
        )
    return text, config, getattr(config, arch_dict[config.model_type]["config_names"]["width"])


def text_weights_for(
    transformer: nn.Module, text: str, weights: str | Path | None, pooler: str
) -> dict[str, Tensor]:
    """The ``transformer``'s state_dict from the file ``weights``, or else from ``text``.

    Raises:
        ValueError: naming the weights that are missing or do not fit.
    """
    own = transformer.state_dict()
    if weights is not None:
        source, given = str(weights), _read_state(weights, "text tower")
    else:
        source, given = text, _pretrained_text(text, transformer.config, pooler)
    fitting = fit_by_name(given, own, own.keys())
    if fitting is None:
        raise ValueError(
            f"the weights of {source} do not fit the text tower of {text}: "
            f"{misfit(given, own, own.keys())}"
        )
    return fitting


def _read_state(path: str | Path, what: str) -> dict[str, Tensor]:
    contents = read_file(Path(path))
    for key in ("state_dict", "model"):
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
    return check_state(contents, Path(path), what)


def _pretrained_text(text: str, config: PretrainedConfig, pooler: str) -> dict[str, Tensor]:
    """The weights that transformers finds; what it would have drawn, or left, is not among them."""
    both = getattr(config, "is_encoder_decoder", False)
    pooled = {} if both else {"add_pooling_layer": pooler == "own"}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(
        transformers_logging.CRITICAL
    )  # a table of what is checked here
    try:
        read, found = AutoModel.from_pretrained(
            text, output_loading_info=True, ignore_mismatched_sizes=True, **pooled
        )
    except Exception as error:  # files, network, formats
        raise unreadable(text, "--text", error) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    state = dict(read.state_dict())
    for key in found["missing_keys"]:
        state.pop(key, None)
    for entry in found["mismatched_keys"]:
        if isinstance(entry, str):  # transformers 4.5x does not say the shape
            state.pop(entry)
        else:
            state[entry[0]] = torch.empty(entry[1])
    parts = {name for name, _ in read.named_children()}
    more = [key for key in found["unexpected_keys"] if key.split(".")[0] in parts]
    return state | {key: torch.empty(0) for key in more}
