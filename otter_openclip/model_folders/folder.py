"""The folder that ``export``, ``convert`` and ``towers`` write, checked as stock open_clip sees it.

It holds open_clip's config, the weights in safetensors and the tokenizer's files. It appears complete or
not at all, and only after stock open_clip has loaded it and given back the same tensors, preprocessing,
tokens and features.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_CONFIG_NAME as CONFIG_FILE
from open_clip.constants import HF_SAFE_WEIGHTS_NAME as WEIGHTS_FILE
from open_clip.factory import LOCAL_DIR_PREFIX
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.tokenizer import HFTokenizer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from otter_openclip.checkpoints.contents import load_weights, without_wrappers
from otter_openclip.files import sync
from otter_openclip.preprocessing import size_pair

PROBE_TEXTS = ["a photo of a cat.", "Two CAFÉS &amp; <b>3</b> dogs", "zxqj"]


def write_folder(
    out: Path,
    model: nn.Module,
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    tokenizer: Any,
    files: Mapping[str, str | bytes] | None = None,
) -> None:
    """Write ``out``, or nothing.

    A Hugging Face text tower's ``config.json`` is written, too. Stock open_clip looks for it under
    ``hf_model_name`` and nowhere else, and takes no path relative to the folder: a tower from the hub
    keeps its name; one from a folder of this machine gets the absolute path of ``out``, which must be
    edited after a move (a warning says so).

    Args:
        out: the folder; checked with :func:`check_out` before.
        model: open_clip model with the weights of ``state``, in eval mode.
        config: its open_clip configuration, the JSON's ``model_cfg``.
        state: what the weights were loaded from, whose dtype they are written in.
        tokenizer: open_clip's.
        files: to write beside them, by name or path; texts in UTF-8.

    Raises:
        RuntimeError: if stock open_clip cannot load the folder, or loads something else than ``model``.
    """
    target = out.resolve()  # of a link to a folder, the folder is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    try:
        temporary.mkdir()
        for name, content in (files or {}).items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        # Cloned, because safetensors refuses tensors that share memory.
        tensors = {
            key: value.to(state.get(key, value).dtype).contiguous().clone()
            for key, value in model.state_dict().items()
        }
        try:
            save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{out} cannot be written, and nothing is there: {error}") from error
        if isinstance(tokenizer, HFTokenizer):
            # Transformers 4.5x would write templates of several names to files that are called so.
            tokenizer.tokenizer.chat_template = None
            tokenizer.save_pretrained(temporary)
        tower = config["text_cfg"].get("hf_model_name")
        if tower:
            tower_config = copy.deepcopy(model.text.config)
            tower_config.name_or_path = ""  # transformers 4 saves it, a folder's path perhaps
            tower_config.save_pretrained(temporary)
        local = bool(tower) and Path(tower).is_dir()
        _write_config(temporary, model, config, temporary if local else None)
        _verify(temporary, model, tokenizer)
        if local:
            _write_config(temporary, model, config, target)
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        _move(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(target.parent)
    if local:
        logging.warning(
            f"{out} must stay where it is: open_clip finds the text tower's config.json by an absolute "
            f"path only. After a move, set hf_model_name in its {CONFIG_FILE} to the new place"
        )


def _beside(target: Path) -> Path:
    """A name for what is not yet, or no longer, ``target``; known before the folder is there."""
    return target.with_name(f".{target.name}-{secrets.token_hex(4)}.unfinished")


def _write_config(
    folder: Path, model: nn.Module, config: Mapping[str, Any], tower: Path | None
) -> None:
    """Write the JSON, with the text tower's ``config.json`` in the folder ``tower`` unless None."""
    config = copy.deepcopy(dict(config))
    if tower is not None:
        config["text_cfg"] |= {"hf_model_name": str(tower), "hf_tokenizer_name": str(tower)}
    save_config_for_hf(model, folder / CONFIG_FILE, config)


def check_out(out: Path, overwrite: bool, *kept: Path) -> None:
    """Refuse an ``out`` whose replacement would lose what is ``kept``, or is no earlier export's."""
    if not overwrite and out.exists() and not _is_empty(out):
        raise FileExistsError(f"{out} exists; choose another folder or pass --overwrite")
    _check_replaceable(out)
    for path in kept:
        if path.resolve().is_relative_to(out.resolve()):
            raise FileExistsError(f"{path} lies in {out}, which is replaced; choose another folder")


def _is_empty(out: Path) -> bool:
    return out.is_dir() and not any(out.iterdir())


def _check_replaceable(out: Path) -> None:
    if out.exists() and not _is_empty(out) and not (out / CONFIG_FILE).is_file():
        raise FileExistsError(
            f"{out} is not an exported model (no {CONFIG_FILE} in it), and nothing else is replaced; "
            "choose another folder"
        )


def check_state(state: Any, path: Path, weights: str) -> dict[str, Tensor]:
    """``state`` without wrappers' prefixes; a ValueError if it is none, or tensors have NaN."""
    if not isinstance(state, Mapping) or not any(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state_dict; give a checkpoint of a training run")
    state = without_wrappers(state)
    bad = [key for key, x in state.items() if isinstance(x, Tensor) and x.isnan().any()]
    if bad:
        raise ValueError(
            f"{path} has NaN in {len(bad)} tensors of the {weights}, first {bad[0]}: its run diverged; "
            "export an earlier epoch"
        )
    return state


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
    """Silence what open_clip and transformers say of weights, which are checked right after."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def load_model(model: nn.Module, state: Mapping[str, Tensor], what: str, hint: str) -> None:
    """Load ``state`` into ``model``; a ValueError of ``what`` does not fit, why, and the ``hint``."""
    try:
        load_weights(model, state)
    except ValueError as error:
        raise ValueError(f"{what}: {error} {hint}") from error
    # What is too large for the model's dtype is infinite by now; buffers may mask with -inf.
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{what}: {key} has infinite values, or too large ones. {hint}")


def _verify(folder: Path, trained: nn.Module, tokenizer: Any) -> None:
    """Load the folder as a user would; compare tensors, preprocessing, tokens and features."""
    name = f"{LOCAL_DIR_PREFIX}{folder}"
    try:
        with errors_only():
            loaded = open_clip.create_model(name).eval()
    except Exception as error:  # Of every type, as open_clip leaves them.
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise RuntimeError(
            f"stock open_clip cannot load the written folder ({reason}); nothing was exported"
        ) from error
    tokens, tokens_again = _tokens(tokenizer), _tokens(open_clip.get_tokenizer(name))
    tensors, again = trained.state_dict(), loaded.state_dict()
    features = zip(_features(trained, tokens), _features(loaded, tokens), strict=True)
    same = {
        "tensors": tensors.keys() == again.keys()
        and all(torch.equal(tensors[key], again[key]) for key in tensors),
        "preprocessing": _preprocessing(trained) == _preprocessing(loaded),
        "tokens": torch.equal(tokens, tokens_again),
        # Equal weights do not make equal models: the activation, for one, has none.
        "features": all(torch.equal(*pair) for pair in features),
    }
    if different := [what for what, equal in same.items() if not equal]:
        raise RuntimeError(
            "what open_clip loads from the written folder differs from training in "
            f"{different[0]}; nothing was exported"
        )


def _preprocessing(model: nn.Module) -> dict[str, Any]:
    config = model.visual.preprocess_cfg
    return {k: list(v) if isinstance(v, list | tuple) else v for k, v in config.items()}


def _tokens(tokenizer: Any) -> Tensor:
    tokenizer = copy.copy(tokenizer)
    tokenizer.reduction_fn = None  # shortens texts at random
    return tokenizer(PROBE_TEXTS)


@torch.no_grad()
def _features(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    height, width = size_pair(model.visual.preprocess_cfg["size"])
    image = torch.linspace(-1, 1, 3 * height * width).reshape(1, 3, height, width)
    return model.encode_image(image), model.encode_text(tokens)


def _move(temporary: Path, out: Path) -> None:
    """Rename to ``out``; an earlier export is deleted last, and put back if the rename fails."""
    _check_replaceable(out)  # it may have appeared since
    aside = _beside(out)
    try:
        if out.exists():
            out.rename(aside)
        temporary.rename(out)
    except BaseException:
        if aside.exists() and not out.exists():
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)
