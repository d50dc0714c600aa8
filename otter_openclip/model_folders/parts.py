"""What ``convert`` and ``towers`` put a model together from: timm's names, the whole, a tokenizer."""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import timm
from open_clip.factory import LOCAL_DIR_PREFIX
from open_clip.tokenizer import HFTokenizer
from torch import nn
from transformers import PretrainedConfig

from otter_openclip.model_folders.folder import CONFIG_FILE, errors_only

# Models whose positions begin behind that of the padding.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta")
# Any of these makes a folder one with a tokenizer in it.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json"),
    *("spiece.model", "sentencepiece.bpe.model"),
)


def check_timm_name(name: str, what: str) -> None:
    """Raise ValueError that suggests the nearest name unless timm has the architecture ``name``."""
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=1)
    raise ValueError(
        f"timm {timm.__version__} has no model {name!r}, {what}"
        + (f"; the nearest is {near[0]}" if near else "")
    )


def build_model(
    config: Mapping[str, Any], text_flag: str, preprocess: Mapping[str, Any] | None = None
) -> nn.Module:
    """Stock open_clip's model of a ``model_cfg`` and ``preprocess_cfg``, with random weights.

    Raises:
        ValueError: if the text tower's configuration cannot be read (naming ``text_flag``, the flag that
            gave it) or open_clip cannot build the towers.
    """
    text_model = config["text_cfg"]["hf_model_name"]
    with tempfile.TemporaryDirectory() as folder, errors_only():
        contents = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(contents))
        try:
            model = open_clip.create_model(
                f"local-dir:{folder}", load_weights=False, pretrained_text=False
            )
        except OSError as error:
            raise unreadable(text_model, text_flag, error) from error
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"open_clip cannot build {config['vision_cfg']['timm_model_name']} + {text_model} "
                f"({type(error).__name__}: {error}); it takes text towers of BERT's and RoBERTa's kind"
            ) from error
    return model.eval()


def check_moved(name: str) -> None:
    """Raise ValueError if the folder ``local-dir:...`` looks for its text tower where nothing is.

    Folders that ``export``, ``convert`` and ``towers`` write name a place, if the tower is no hub's.
    """
    if not name.startswith(LOCAL_DIR_PREFIX):
        return
    try:
        tower = Path(open_clip.get_model_config(name)["text_cfg"].get("hf_model_name") or "")
    except Exception:  # whoever loads the folder says what is wrong with it
        return
    if tower.is_absolute() and not tower.is_dir():
        raise ValueError(
            f"{name} looks for its text tower in {tower}, which is not there; if the folder was moved, "
            f"set hf_model_name and hf_tokenizer_name in its {CONFIG_FILE} to its present place"
        )


def unreadable(text_model: str, flag: str, error: Exception) -> ValueError:
    """An error for a text tower whose files cannot be read, with what to do."""
    reason = (str(error).strip().splitlines() or [""])[0]
    return ValueError(
        f"the text tower {text_model} cannot be read ({reason}); pass {flag} with a folder that "
        "has its config.json and tokenizer, or allow access to the Hugging Face hub"
    )


def longest_text(config: PretrainedConfig) -> int | None:
    """Tokens that a text tower of Hugging Face takes; None for any number."""
    most = getattr(config, "max_position_embeddings", None)
    if most and config.model_type in _OFFSET_POSITIONS:
        most -= (config.pad_token_id or 0) + 1
    return most


def check_longest(given_as: str, length: int, text_model: str, config: PretrainedConfig) -> None:
    """Raise ValueError if that tower cannot take texts of ``length`` tokens."""
    if (most := longest_text(config)) and length > most:
        raise ValueError(
            f"{given_as} {length} is more than the {most} tokens that {text_model} takes"
        )


def check_shortest(given_as: str, tokenizer: HFTokenizer, text_model: str) -> None:
    """Raise ValueError if ``tokenizer`` has no room for words in its context."""
    length, own = tokenizer.context_length, tokenizer.tokenizer.num_special_tokens_to_add()
    if length <= own:
        raise ValueError(
            f"{given_as} {length} leaves no room for words: the tokenizer of {text_model} puts {own} "
            f"tokens of its own around them; take {own + 1} or more"
        )


def read_tokenizer(
    text_model: str, flag: str, context_length: int, vocab_size: int, tower: str = "the text tower"
) -> HFTokenizer | None:
    """The text tower's tokenizer; None if it is a folder without one.

    Raises:
        ValueError: if it cannot be read, or has more tokens than ``tower``'s ``vocab_size``.
    """
    folder = Path(text_model)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        tokenizer = HFTokenizer(text_model, context_length=context_length)
    except Exception as error:  # files, network, formats
        raise unreadable(text_model, flag, error) from error
    if tokenizer.tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {text_model} has no pad token, which open_clip needs; name one in its "
            "tokenizer_config.json, and its number as pad_token_id in config.json"
        )
    check_shortest("context_length", tokenizer, text_model)
    size = len(tokenizer.tokenizer)
    if size > vocab_size:
        raise ValueError(
            f"the tokenizer of {text_model} has {size} tokens, {tower} {vocab_size}; "
            f"pass {flag} with the one it was trained with"
        )
    return tokenizer
