"""What ``convert`` and ``towers`` put together: a configuration's model, a tokenizer, weights.

Weights of a timm tower and of a Hugging Face tower are loaded, or refused by name.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import timm
from open_clip.factory import LOCAL_DIR_PREFIX
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from otter_openclip.checkpoints.contents import load_weights, read_file
from otter_openclip.model_folders.folder import CONFIG_FILE, check_state, errors_only

_COUNTER = "num_batches_tracked"  # Older files have none; nothing but training reads it.
# What a tensor is called in every architecture: weight and bias of a norm have the same shape.
_KINDS = {"weight", "bias", "running_mean", "running_var", _COUNTER}
# What masked autoencoders learn with and leave behind.
_PRETRAINING = ("decoder", "mask_token")
# Where files keep a state_dict: Lightning and timm; MAE and torchvision; DINO, the better one of two.
_NESTED = ("state_dict", "model", "teacher")
# What files of text towers have that is no weight, or the weight of a pooler that is not asked for.
_UNUSED = ("position_ids", "token_type_ids", "pooler.dense.weight", "pooler.dense.bias")


def build_model(
    config: Mapping[str, Any], preprocess: Mapping[str, Any] | None = None
) -> nn.Module:
    """Stock open_clip's model of a ``model_cfg`` and ``preprocess_cfg``, with random weights."""
    text_model = config["text_cfg"]["hf_model_name"]
    with tempfile.TemporaryDirectory() as folder, errors_only():
        contents = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
        Path(folder, CONFIG_FILE).write_text(json.dumps(contents), encoding="utf-8")
        try:
            model = open_clip.create_model(
                f"{LOCAL_DIR_PREFIX}{folder}", load_weights=False, pretrained_text=False
            )
        except OSError as error:
            raise unreadable(text_model, error) from error
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"open_clip cannot build {config['vision_cfg']['timm_model_name']} + {text_model} "
                f"({type(error).__name__}: {error}); it takes text towers of BERT's and RoBERTa's kind"
            ) from error
    return model.eval()


def unreadable(text_model: str, error: Exception) -> ValueError:
    """An error for a text tower whose files cannot be read, with what to do."""
    reason = (str(error).strip().splitlines() or [""])[0]
    return ValueError(
        f"the text tower {text_model} cannot be read ({reason}); give a folder that has its config.json "
        "and tokenizer, or allow access to the Hugging Face hub"
    )


def read_tokenizer(text_model: str, context_length: int, vocab_size: int) -> HFTokenizer:
    """The text tower's tokenizer, of at most ``vocab_size`` tokens."""
    try:
        tokenizer = HFTokenizer(text_model, context_length=context_length)
    except Exception as error:  # Each file format, and the network, has errors of its own.
        raise unreadable(text_model, error) from error
    tokens = len(tokenizer.tokenizer)
    # Of a folder without a tokenizer transformers makes one that knows no word.
    if tokens <= len(tokenizer.tokenizer.all_special_ids):
        raise ValueError(f"no tokenizer in the folder {text_model}; put its tokenizer.json there")
    if tokens > vocab_size:
        raise ValueError(
            f"the tokenizer of {text_model} has {tokens} tokens, the text tower {vocab_size}; "
            "give the one it was trained with"
        )
    return tokenizer


def read_trunk(image: str, weights: str | Path | None) -> nn.Module:
    """timm's tower without its classifier, pretrained, in eval mode."""
    try:
        trunk = timm.create_model(image, pretrained=weights is None)
    except Exception as error:  # There may be no such tag, no weights, no network, no space.
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"timm cannot build {image}, or has no weights of it at hand ({reason}); pass "
            "--image-weights FILE, or allow access to the Hugging Face hub"
        ) from error
    with_classifier = trunk.state_dict()
    trunk.reset_classifier(0)
    if weights is not None:
        _load_trunk(trunk, with_classifier, Path(weights), image)
    return trunk.eval()


def _load_trunk(
    trunk: nn.Module, with_classifier: Mapping[str, Tensor], path: Path, image: str
) -> None:
    """Load the file's weights by name, or else in order if all shapes agree one to one."""
    state = _read_state(path, "image tower")
    try:
        _load_by_name(trunk, state, tuple(with_classifier.keys() - trunk.state_dict().keys()))
    except ValueError as error:
        in_order = None
        if path.suffix != ".safetensors":  # They do not keep the order.
            in_order = _in_order(state, with_classifier) or _in_order(state, trunk.state_dict())
        if in_order is None:
            raise ValueError(
                f"{path} does not fit {image}, by name ({error}) or in the order of a .pt file"
            ) from error
        load_weights(trunk, {key: in_order[key] for key in in_order if key in trunk.state_dict()})


def _load_by_name(module: nn.Module, state: Mapping[str, Tensor], unused: tuple[str, ...]) -> None:
    """Load ``state``, whose names may stand behind a prefix: what lies outside of it is left out.

    So are names that end with one of ``unused`` or are of pretraining, and are not the module's.
    """
    names = module.state_dict().keys()
    first = next(iter(names))
    prefixes = {key.removesuffix(first) for key in state if f".{key}".endswith(f".{first}")}
    # A decoder may have the names too: it comes last, so that the encoder is taken.
    ordered = sorted(prefixes, reverse=True) or [""]
    having = {prefix: sum(prefix + name in state for name in names) for prefix in ordered}
    prefix = max(ordered, key=having.get)
    if equal := [other for other in ordered if other != prefix and having[other] == having[prefix]]:
        logging.warning(f"The weights are there as {prefix}* and {equal[0]}*: {prefix}* is taken")
    inside = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    left = [k for k in inside if k.endswith(unused) or k.startswith(_PRETRAINING)]
    load_weights(module, {k: v for k, v in inside.items() if k in names or k not in left})


def _in_order(state: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """``state`` under the ``names`` of tensors at the same places; None unless each shape fits."""
    if not any(key.endswith(_COUNTER) for key in state):
        names = {name: like for name, like in names.items() if not name.endswith(_COUNTER)}
    if len(state) != len(names):
        return None
    for (key, value), (name, like) in zip(state.items(), names.items(), strict=True):
        kinds = {text.rpartition(".")[2] for text in (key, name)}
        if value.shape != like.shape or (len(kinds) == 2 and kinds <= _KINDS):
            return None
    return dict(zip(names, state.values(), strict=True))


def text_config(text: str) -> tuple[str, PretrainedConfig, int]:
    """Name (of a folder, the absolute path), configuration and width of the text tower."""
    if Path(text).is_dir():
        text = str(Path(text).resolve())
    try:
        config = AutoConfig.from_pretrained(text)
    except Exception as error:  # Files, network, values of every wrong kind.
        raise unreadable(text, error) from error
    if (width := getattr(config, "hidden_size", None)) is None:
        fault = f"{text} is a model of the type {config.model_type}"
        raise ValueError(f"{fault}; open_clip takes text towers of BERT's and RoBERTa's kind")
    return text, config, width


def load_text_tower(
    transformer: nn.Module, text: str, weights: str | Path | None, pooler: str
) -> None:
    """Load the file ``weights``, or else what ``text`` has; ValueError names what does not fit."""
    if weights is None:
        state = _pretrained_text(text, transformer.config, pooler)
    else:
        state = _read_state(Path(weights), "text tower")
    try:
        _load_by_name(transformer, state, _UNUSED)
    except ValueError as error:
        raise ValueError(
            f"the weights of {weights or text} do not fit the text tower of {text}: {error}"
        ) from error


def _read_state(path: Path, what: str) -> dict[str, Tensor]:
    contents = read_file(path)
    nested = [key for key, value in contents.items() if isinstance(value, Mapping)]
    nested = [key for key in nested if any(isinstance(x, Tensor) for x in contents[key].values())]
    taken = []
    for key in (*_NESTED, *(nested if len(nested) == 1 else ())):
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
            taken.append(key)
    if nested[1:] and not taken:
        raise ValueError(f"{path} holds {', '.join(nested)}; save the weights you mean alone")
    if nested[1:]:
        logging.warning(f"{path} holds {', '.join(nested)}: {taken[0]} is taken")
    return check_state(contents, path, what)


def _pretrained_text(text: str, config: PretrainedConfig, pooler: str) -> dict[str, Tensor]:
    """The weights that transformers finds, without those that it would draw."""
    both = getattr(config, "is_encoder_decoder", False)
    pooled = {} if both else {"add_pooling_layer": pooler == "own"}
    try:
        with errors_only():
            tower, loading = AutoModel.from_pretrained(
                text, output_loading_info=True, ignore_mismatched_sizes=True, **pooled
            )
    except Exception as error:  # Files, network, formats.
        raise unreadable(text, error) from error
    # An entry is a name, or begins with one: transformers says the shapes since version 5.
    drawn = [*loading["missing_keys"], *loading["mismatched_keys"]]
    drawn = [entry if isinstance(entry, str) else entry[0] for entry in drawn]
    parts = [name for name, _ in tower.named_children()]
    further = [key for key in loading["unexpected_keys"] if key.split(".")[0] in parts]
    if wrong := drawn + [key for key in further if not key.endswith(_UNUSED)]:
        raise ValueError(
            f"the weights of {text} are not those of its config.json: {wrong[0]} is missing, of "
            "another shape, or one too many"
        )
    return tower.state_dict()
