"""What ``convert`` and ``towers`` put together: the model of a configuration, and its tokenizer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import LOCAL_DIR_PREFIX
from open_clip.tokenizer import HFTokenizer
from torch import nn

from otter_openclip.model_folders.folder import CONFIG_FILE, errors_only

# Any of these makes a folder one with a tokenizer in it.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
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
        Path(folder, CONFIG_FILE).write_text(json.dumps(contents))
        try:
            model = open_clip.create_model(
                f"{LOCAL_DIR_PREFIX}{folder}", load_weights=False, pretrained_text=False
            )
        except OSError as error:
            raise unreadable(text_model, text_flag, error) from error
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"open_clip cannot build {config['vision_cfg']['timm_model_name']} + {text_model} "
                f"({type(error).__name__}: {error}); it takes text towers of BERT's and RoBERTa's kind"
            ) from error
    return model.eval()


def unreadable(text_model: str, flag: str, error: Exception) -> ValueError:
    """An error for a text tower whose files cannot be read, with what to do."""
    reason = (str(error).strip().splitlines() or [""])[0]
    return ValueError(
        f"the text tower {text_model} cannot be read ({reason}); pass {flag} with a folder that "
        "has its config.json and tokenizer, or allow access to the Hugging Face hub"
    )


def read_tokenizer(
    text_model: str, flag: str, context_length: int, vocab_size: int
) -> HFTokenizer | None:
    """The text tower's tokenizer; None if it is a folder without one.

    Raises:
        ValueError: if it cannot be read, or has more tokens than the tower's ``vocab_size``.
    """
    folder = Path(text_model)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        tokenizer = HFTokenizer(text_model, context_length=context_length)
    except Exception as error:  # Each file format, and the network, has errors of its own.
        raise unreadable(text_model, flag, error) from error
    if (tokens := len(tokenizer.tokenizer)) > vocab_size:
        raise ValueError(
            f"the tokenizer of {text_model} has {tokens} tokens, the text tower {vocab_size}; "
            f"pass {flag} with the one it was trained with"
        )
    return tokenizer
