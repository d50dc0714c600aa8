"""Push an exported folder to the Hugging Face hub.

Not with open_clip's ``push_to_hf_hub``: it states the licence MIT for the weights, leaves a local text
tower's path in the configuration, and uploads every weight twice.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import HfApi

from otter_openclip.model_folders.card import CARD_FILE
from otter_openclip.model_folders.folder import CONFIG_FILE


def push(out: Path, repository: str, *, private: bool) -> str:
    """Upload the folder, its configuration last; a line that says what was done.

    A card that the repository already has stays. RuntimeError if the hub refuses.
    """
    try:
        api = HfApi()
        url = api.create_repo(repository, private=private, exist_ok=True)
        has_card = api.file_exists(repository, CARD_FILE)
        left_out = [CONFIG_FILE, CARD_FILE] if has_card else [CONFIG_FILE]
        api.upload_folder(repo_id=repository, folder_path=out, ignore_patterns=left_out)
        api.upload_file(
            repo_id=repository,
            path_or_fileobj=_portable(
                (out / CONFIG_FILE).read_text(encoding="utf-8"), repository
            ).encode(),
            path_in_repo=CONFIG_FILE,
        )
    except Exception as error:  # Of network, credentials, names.
        raise RuntimeError(
            f"{out} is complete, but could not be pushed to {repository}: {error}; see `hf auth login`"
        ) from error
    note = f"; it has a {CARD_FILE} already, the new one is in {out}" if has_card else ""
    return f"Pushed to {url}{note}"


def _portable(config: str, repository: str) -> str:
    """open_clip's configuration with the repository's name for paths of this machine.

    The text tower's ``config.json`` and the tokenizer, to which they lead, are in the repository.
    """
    written = json.loads(config)
    text_config = written["model_cfg"]["text_cfg"]
    for key in ("hf_model_name", "hf_tokenizer_name"):
        name = text_config.get(key)
        if name and (Path(name).is_absolute() or Path(name).is_dir()):
            text_config[key] = repository
    return json.dumps(written, indent=2)
