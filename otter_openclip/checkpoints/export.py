"""Turn a training checkpoint into a folder that stock open_clip and clip_benchmark load.

``open_clip.create_model("local-dir:OUT")``, ``open_clip.get_tokenizer("local-dir:OUT")`` and
``clip_benchmark eval --model local-dir:OUT`` use the folder as it is, without this package. A text
tower from Hugging Face keeps its ``hf_model_name``, from which open_clip fetches the tower's
configuration (not its weights); the tokenizer's files are in the folder.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX, _get_hf_config, load_state_dict
from open_clip.push_to_hf_hub import push_to_hf_hub, save_config_for_hf
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHTS = ("student", "teacher")
WEIGHTS_FILE = "open_clip_model.safetensors"

# open_clip_train's flags that change the model or its preprocessing; read back from params.txt.
_MODEL_FLAGS: dict[str, dict[str, Any]] = {
    "--force-image-size": {"type": int, "nargs": "+"},
    "--force-context-length": {"type": int},
    "--force-quick-gelu": {"action": "store_true", "default": None},
    "--force-custom-text": {"action": "store_true", "default": None},
    "--image-mean": {"type": float, "nargs": "+"},
    "--image-std": {"type": float, "nargs": "+"},
    "--image-interpolation": {"choices": ["bicubic", "bilinear", "random"]},
    "--image-resize-mode": {"choices": ["shortest", "longest", "squash"]},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="epoch_N.pt, a file of bare weights, or a run's folder (its newest checkpoint)",
    )
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="model name the run was trained under; by default the one in its params.txt",
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="student", help="default: student")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="then push it with open_clip's own push_to_hf_hub"
    )
    group = parser.add_argument_group(
        "model flags", "as in training; by default those in the run's params.txt"
    )
    for flag, keywords in _MODEL_FLAGS.items():
        group.add_argument(flag, **keywords)


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    logging.getLogger().setLevel(logging.WARNING)
    names = [flag.lstrip("-").replace("-", "_") for flag in _MODEL_FLAGS]
    flags = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    out = export_checkpoint(
        args.checkpoint,
        args.out,
        model=args.model,
        weights=args.weights,
        overwrite=args.overwrite,
        push_to_hub=args.push_to_hub,
        **flags,
    )
    print(f"Wrote {out}; re-loaded with open_clip, every tensor is the checkpoint's.")
    print(f"  open_clip.create_model_and_transforms('local-dir:{out}')")
    return 0


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    weights: str = "student",
    overwrite: bool = False,
    push_to_hub: str | None = None,
    **flags: Any,
) -> Path:
    """Write ``checkpoint`` as a folder for stock open_clip and compare what it loads from there.

    Args:
        checkpoint: a checkpoint of ``open_clip_train`` or this package, a file of bare weights, or a
            run's folder, of which the newest checkpoint is taken.
        out: folder to write. It appears complete or not at all.
        model: open_clip model name; by default the one in the run's ``params.txt``.
        weights: "student", or "teacher" for the EMA teacher of ``--loss kd`` and ``otter``.
        overwrite: replace ``out`` if it exists.
        push_to_hub: repository name to push to with ``open_clip``'s own ``push_to_hf_hub``.
        flags: open_clip_train's model flags (``force_image_size``, ``image_mean``, ...); by default
            those in ``params.txt``.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        FileExistsError: if ``out`` exists and is not to be overwritten.
        ValueError: if the model is unknown or does not fit the weights, or there is no teacher.
        RuntimeError: if what open_clip loads from the written folder is not what the checkpoint has.
    """
    path, out = _find_checkpoint(Path(checkpoint)), Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another folder or pass --overwrite")
    recorded = _read_params(path)
    model = model or recorded.get("model")
    if model is None:
        raise ValueError(
            f"no params.txt beside {path} names its model; pass --model with the name used in training"
        )
    if recorded and recorded["model"] != model:
        logging.warning(f"--model {model}, but the run's params.txt says {recorded['model']}")
    flags = {k: v for k, v in recorded.items() if k != "model"} | flags

    state = _read_weights(path, weights)
    config = _model_config(model, flags)
    logging.disable(logging.WARNING)  # "initialized randomly": the weights come next
    try:
        trained = _build(model, flags)
    finally:
        logging.disable(logging.NOTSET)
    _load(trained, state, model, path)

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        temporary.chmod(0o755)
        # Cloned: safetensors refuses tensors that share memory.
        tensors = {k: v.detach().contiguous().clone() for k, v in trained.state_dict().items()}
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        save_config_for_hf(trained, temporary / "open_clip_config.json", config)
        tokenizer = open_clip.get_tokenizer(model, context_length=flags.get("force_context_length"))
        if isinstance(tokenizer, HFTokenizer):
            tokenizer.save_pretrained(temporary)
        _compare(temporary, trained)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if push_to_hub is not None:
        push_to_hf_hub(trained, tokenizer, config, push_to_hub)
    return out


def _find_checkpoint(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint {path}")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    latest = folder / "epoch_latest.pt"
    if latest.is_file():
        return latest
    numbered = [p for p in folder.glob("epoch_*.pt") if re.fullmatch(r"epoch_\d+", p.stem)]
    if not numbered:
        raise FileNotFoundError(f"no epoch_N.pt and no epoch_latest.pt in {folder}")
    newest = max(numbered, key=lambda p: int(p.stem.removeprefix("epoch_")))
    print(f"Newest checkpoint: {newest}")
    return newest


def _read_params(path: Path) -> dict[str, Any]:
    """Model and model flags from the ``params.txt`` that open_clip_train leaves beside a run."""
    file = path.parent.parent / "params.txt"
    if path.parent.name != "checkpoints" or not file.is_file():
        return {}
    lines = dict(line.split(": ", 1) for line in file.read_text().splitlines() if ": " in line)
    params = {"model": lines["model"]}
    for flag in _MODEL_FLAGS:
        name = flag.lstrip("-").replace("-", "_")
        text = lines.get(name, "None")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if value not in (None, False):
            params[name] = value
    return params


def _read_weights(path: Path, weights: str) -> Mapping[str, Tensor]:
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if weights == "student":
        return load_state_dict(str(path), weights_only=True)
    entry: dict[str, Any] = {}
    if path.suffix != ".safetensors":
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        entry = checkpoint.get("optimizer", {}).get("otter", {})
    if "teacher" not in entry:
        loss = entry.get("settings", {}).get("loss", "clip")
        raise ValueError(
            f"{path} has no EMA teacher (its run used --loss {loss}, or a fixed teacher); only --loss "
            "kd and otter without --distill-model have one; use --weights student"
        )
    return entry["teacher"]


def _model_config(model: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The model's JSON with training's ``--force`` flags written into it."""
    if model.startswith(LOCAL_DIR_PREFIX):
        folder = Path(model.removeprefix(LOCAL_DIR_PREFIX))
        config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    elif model.startswith(HF_HUB_PREFIX):
        config = _get_hf_config(model.removeprefix(HF_HUB_PREFIX))["model_cfg"]
    else:
        config = open_clip.get_model_config(model.replace("/", "-"))
        if config is None:
            near = difflib.get_close_matches(model, open_clip.list_models(), n=3, cutoff=0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"open_clip knows no model {model!r}{hint}")
    config = copy.deepcopy(config)
    if flags.get("force_image_size") is not None:
        config["vision_cfg"]["image_size"] = _square(flags["force_image_size"])
    if flags.get("force_context_length") is not None:
        config["text_cfg"]["context_length"] = flags["force_context_length"]
    if flags.get("force_quick_gelu"):
        config["quick_gelu"] = True
    if flags.get("force_custom_text"):
        config["custom_text"] = True
    # Towers' own weights are never wanted: those of the folder replace them.
    for part, name, key in (
        ("vision_cfg", "timm_model_name", "timm_model_pretrained"),
        ("text_cfg", "hf_model_name", "hf_model_pretrained"),
    ):
        if name in config[part]:
            config[part][key] = False
    return config


def _square(size: int | list[int]) -> int | list[int]:
    return size[0] if isinstance(size, list | tuple) and len(size) == 1 else size


def _build(model: str, flags: Mapping[str, Any]) -> nn.Module:
    """The model as training made it: same architecture, same preprocessing, random weights."""
    trained, _, _ = open_clip.create_model_and_transforms(
        model,
        load_weights=False,
        pretrained_image=False,
        pretrained_text=False,
        force_image_size=_square(flags.get("force_image_size")),
        force_context_length=flags.get("force_context_length"),
        force_quick_gelu=bool(flags.get("force_quick_gelu")),
        force_custom_text=bool(flags.get("force_custom_text")),
        image_mean=_triple(flags.get("image_mean")),
        image_std=_triple(flags.get("image_std")),
        image_interpolation=flags.get("image_interpolation"),
        image_resize_mode=flags.get("image_resize_mode"),
    )
    return trained


def _triple(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(values) * (3 if len(values) == 1 else 1)


def _load(model: nn.Module, state: Mapping[str, Tensor], name: str, path: Path) -> None:
    own = model.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in state]
    wrong += [f"{key} is not the model's" for key in state if key not in own]
    wrong += [
        f"{key} is {tuple(state[key].shape)}, the model's {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ValueError(
            f"{path} does not fit the model {name}: {shown}. It was trained under another --model or "
            "with --force flags that were not given here"
        )
    model.load_state_dict(state)


def _compare(folder: Path, trained: nn.Module) -> None:
    """Load the folder as a user would and compare every tensor with the source's."""
    loaded = open_clip.create_model(f"{LOCAL_DIR_PREFIX}{folder}").state_dict()
    expected = trained.state_dict()
    bad = sorted(
        key
        for key in expected.keys() | loaded.keys()
        if key not in expected or key not in loaded or not torch.equal(expected[key], loaded[key])
    )
    if bad:
        raise RuntimeError(
            f"what open_clip loads from the written folder differs from the checkpoint in {len(bad)} "
            f"tensors, first {bad[0]}; nothing was exported"
        )
