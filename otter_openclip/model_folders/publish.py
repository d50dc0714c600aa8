"""Push an exported folder to the Hugging Face hub: what was checked is what is pushed.

Not with open_clip's ``push_to_hf_hub``: it states the licence MIT for the weights, leaves a local text
tower's path in the configuration, and uploads every weight twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from otter_openclip.model_folders.card import CARD_FILE
from otter_openclip.model_folders.folder import CONFIG_FILE

TEXT_SOURCES = ("hf_model_name", "hf_tokenizer_name")
VOCABULARIES = ("tokenizer.json", "vocab.json")  # words like //, which are paths too


def check_repository(name: str) -> None:
    """Raise ValueError unless ``name`` says whose repository it is, and its name."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(
            f"--push-to-hub takes OWNER/NAME, got {name!r}; `hf auth whoami` says who you are"
        )


def push(out: Path, repository: str, *, private: bool) -> str:
    """Upload the folder in one commit; a card that the repository already has stays.

    The paths of this machine in open_clip's configuration become the repository's name: the text
    tower's ``config.json`` and the tokenizer are in it.

    Returns:
        A line that says what was done.

    Raises:
        ValueError: if another file would tell a path of this machine.
        RuntimeError: if the hub refuses.
    """
    contents: dict[str, Path | bytes] = {
        path.relative_to(out).as_posix(): path for path in sorted(out.rglob("*")) if path.is_file()
    }
    contents[CONFIG_FILE] = _portable((out / CONFIG_FILE).read_text(), repository).encode()
    for name, content in contents.items():
        if name.endswith(".json") and name not in VOCABULARIES:
            text = content.read_bytes() if isinstance(content, Path) else content
            for value in _paths(json.loads(text)):
                raise ValueError(
                    f"{out} is complete, but was not pushed: {name} in it names {value}, a path of this "
                    "machine; edit it and upload the folder"
                )
    try:
        api = HfApi()
        url = api.create_repo(repository, private=private, exist_ok=True)
        kept = api.file_exists(repository, CARD_FILE)
        if kept:
            del contents[CARD_FILE]
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(repository, operations, commit_message="Add model")
    except Exception as error:  # network, credentials, names
        raise RuntimeError(
            f"{out} is complete, but could not be pushed to {repository}: {error}; see `hf auth login`"
        ) from error
    note = f"; it has a {CARD_FILE} already, which stays: the new one is in {out}" if kept else ""
    return f"Pushed to {url}{note}"


def _portable(text: str, repository: str) -> str:
    written = json.loads(text)
    text_config = written["model_cfg"]["text_cfg"]
    for key in TEXT_SOURCES:
        name = text_config.get(key)
        if name and (Path(name).is_absolute() or Path(name).is_dir()):
            text_config[key] = repository
    return json.dumps(written, indent=2)


def _paths(value: Any) -> Iterator[str]:
    """The strings in JSON that are existing absolute paths."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, str) and len(value) > 1 and "\n" not in value[:4096]:
        if Path(value).is_absolute() and len(value) < 4096 and Path(value).exists():
            yield value
