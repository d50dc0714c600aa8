"""Turn a training checkpoint into a folder for stock open_clip; ``export_command`` has the flags."""

from __future__ import annotations

import ast
import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import parse_model_name
from open_clip.pretrained import get_pretrained_cfg
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from otter_openclip.checkpoints.contents import ENTRY, JUDGED, JUDGED_WEIGHTS, TEACHER
from otter_openclip.checkpoints.newest import newest_checkpoint, read_checkpoint
from otter_openclip.cli import did_you_mean
from otter_openclip.model_folders.card import CARD_FILE, model_card, read_results, read_settings
from otter_openclip.model_folders.export_command import MODEL_FLAGS, WEIGHTS
from otter_openclip.model_folders.folder import (
    check_out,
    check_state,
    errors_only,
    load_model,
    write_folder,
)
from otter_openclip.model_folders.publish import push
from otter_openclip.numerics import check_choice
from otter_openclip.untrusted import no_code_from_files

PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


@no_code_from_files()
def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    weights: str | None = None,
    overwrite: bool = False,
    license: str | None = None,
    results: Sequence[str | Path] = (),
    push_to_hub: str | None = None,
    private: bool = False,
    report: Callable[[str], None] = logging.info,
    **flags: Any,
) -> Path:
    """Write ``checkpoint`` as a folder for stock open_clip and compare what it loads from there.

    Args:
        checkpoint: a checkpoint of ``open_clip_train`` or this package, a file of bare weights, or a
            run's folder, of which the newest checkpoint is taken.
        out: folder to write. It appears complete or not at all.
        model: open_clip model name; by default the one in the run's ``params.txt``.
        weights: "student", or "teacher" for the EMA: the teacher of ``--loss kd`` and ``otter``, or
            what ``--loss clip --ema-decay D`` kept. By default those that ``best.pt`` was chosen by,
            and of other checkpoints the student.
        overwrite: replace ``out`` if it is an earlier export.
        license: the hub's identifier of the weights' licence, for the card; none is assumed.
        results: result files of ``otter-openclip eval`` or ``clip_benchmark eval``, for the card.
        push_to_hub: OWNER/NAME of a repository to push the folder to; needs ``license``.
        private: make that repository, if it is new, a private one.
        report: called with lines that say which checkpoint, model and flags are used.
        flags: open_clip_train's model flags (``force_image_size``, ``image_mean``, ...); by default
            those in ``params.txt``.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        FileExistsError: if ``out`` exists and is not to be overwritten.
        ValueError: if the checkpoint cannot be used, the model is unknown or does not fit it, stock
            open_clip cannot rebuild the model, there is no teacher, a result file is none, or something
            is to be pushed without a licence.
        RuntimeError: if what open_clip loads from the written folder is not what the checkpoint has,
            or the push failed.
    """
    path, out = _find_checkpoint(Path(checkpoint)), Path(out)
    if push_to_hub is not None and push_to_hub.count("/") != 1:
        raise ValueError(f"--push-to-hub takes OWNER/NAME, got {push_to_hub}")
    if push_to_hub is not None and license is None:
        raise ValueError(
            "--push-to-hub needs --license: the licence of your weights is yours to say, e.g. "
            "--license cc-by-nc-4.0, or other"
        )
    evaluated, evaluated_as = read_results(results)
    check_out(out, overwrite, path, *map(Path, results))
    model, flags = _settings(path, model, flags)
    config = _model_config(model, flags)
    contents = read_checkpoint(path)
    weights = _which_weights(contents, path, weights, report)
    state = _weights_of(contents, path, weights)
    if "logit_bias" in state:  # --siglip
        config.setdefault("init_logit_bias", -10)
    report(f"Exporting the {weights} of {path} as {model}")
    trained = _build(model, flags, config)
    _check_frozen_norms(trained, state)
    load_model(
        trained,
        state,
        f"{path} does not fit the model {model}",
        "It was trained under another --model or with --force flags that were not given here",
    )
    tokenizer = open_clip.get_tokenizer(model, context_length=flags.get("force_context_length"))

    card = model_card(
        push_to_hub or out.resolve().name,
        f"local-dir:{out.name}" if push_to_hub is None else f"hf-hub:{push_to_hub}",
        weights=weights,
        epoch=contents.get("epoch"),
        settings=read_settings(_params_lines(path) | {"model": model}, contents.get(ENTRY, {})),
        licence=license,
        results=evaluated,
        evaluated_as=evaluated_as,
    )
    write_folder(out, trained, config, state, tokenizer, {CARD_FILE: card})
    if push_to_hub is not None:
        report(push(out, push_to_hub, private=private))
    return out


def _find_checkpoint(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint {path}; give an epoch_N.pt or a run's folder")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest = newest_checkpoint(folder)
    if newest is None:
        raise FileNotFoundError(f"no epoch_N.pt and no epoch_latest.pt in {folder}")
    return newest


def _settings(
    path: Path, model: str | None, arguments: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Model name and flags: the arguments, then params.txt's, then of the run's --pretrained tag."""
    names = [flag.removeprefix("--").replace("-", "_") for flag in MODEL_FLAGS]
    params = _params_lines(path)
    trained_as, tag = params.get("model"), params.get("pretrained")
    recorded = {name: _literal(params[name]) for name in names if name in params}
    if (model or trained_as) is None:
        raise ValueError(
            f"no params.txt beside {path} names its model; pass --model with the name used in training"
        )
    flags = {
        name: _plain(name, value)
        for source in (_tag_flags(trained_as, tag), recorded, arguments)
        for name, value in source.items()
        if value is not None and value is not False
    }
    return model or trained_as, flags


def _literal(text: str) -> Any:
    """A value of ``params.txt``, where words stand without quotes."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _params_lines(path: Path) -> dict[str, str]:
    """What the ``params.txt`` says that training leaves; nothing if there is none."""
    for folder in (path.absolute().parent, path.resolve().parent):  # a link may lead to the run
        file = folder.parent / "params.txt"
        if folder.name == "checkpoints" and file.is_file():
            # open_clip alone writes it in the locale's encoding.
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            return dict(line.split(": ", 1) for line in lines if ": " in line)
    return {}


def _plain(name: str, value: Any) -> Any:
    """Sequences as lists; one ``--force-image-size`` as a number, as open_clip_train has it."""
    if isinstance(value, list | tuple):
        return value[0] if name == "force_image_size" and len(value) == 1 else list(value)
    return value


def _tag_flags(model: str | None, tag: str | None) -> dict[str, Any]:
    """Preprocessing that came with the tag a run started from (SigLIP's mean, for one)."""
    if not model or not tag or parse_model_name(model)[0] is not None:
        return {}
    config = get_pretrained_cfg(model.replace("/", "-"), tag) or {}
    return {f"image_{key}": config[key] for key in PREPROCESSING if key in config}


def _which_weights(
    contents: Mapping[str, Any], path: Path, weights: str | None, report: Callable[[str], None]
) -> str:
    """``weights``, or else those that a best.pt was chosen by."""
    if weights is not None:
        check_choice("weights", weights, WEIGHTS)
    judged = contents.get(JUDGED, {}).get(JUDGED_WEIGHTS)
    if judged and weights is None:
        report(f"{path} is the best epoch of the {judged}; --weights takes others")
    return weights or judged or WEIGHTS[0]


def _weights_of(contents: Mapping[str, Any], path: Path, weights: str) -> dict[str, Tensor]:
    if weights == "student":
        return check_state(contents.get("state_dict", contents), path, weights)
    if "teacher_state" not in contents.get(ENTRY, {}):
        raise ValueError(f"{path} has no EMA teacher; use --weights student")
    return check_state(contents[TEACHER], path, weights)


def _model_config(model: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The model's JSON with training's ``--force`` flags written into it."""
    config = open_clip.get_model_config(
        model if parse_model_name(model)[0] else model.replace("/", "-")
    )
    if config is None:
        hint = did_you_mean(model, open_clip.list_models())
        raise ValueError(f"open_clip knows no model {model!r}{hint}")
    config = copy.deepcopy(config)
    if "force_image_size" in flags:
        config["vision_cfg"]["image_size"] = flags["force_image_size"]
    if "force_context_length" in flags:
        config["text_cfg"]["context_length"] = flags["force_context_length"]
    config |= {name: True for name in ("quick_gelu", "custom_text") if f"force_{name}" in flags}
    # Towers' own weights are never wanted: those of the folder replace them.
    for part, tower in (("vision_cfg", "timm"), ("text_cfg", "hf")):
        if f"{tower}_model_name" in config[part]:
            config[part][f"{tower}_model_pretrained"] = False
    return config


def _check_frozen_norms(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if open_clip has frozen a batch norm so that its activation was dropped.

    Its ``--lock-image-freeze-bn-stats`` puts a batch norm without a counter in the place of timm's,
    which holds the activation. No model that open_clip builds gives what was trained so.
    """
    for name, module in model.named_modules():
        if isinstance(module, BatchNormAct2d) and f"{name}.running_mean" in state:
            if f"{name}.num_batches_tracked" not in state:
                raise ValueError(
                    f"{name}.num_batches_tracked is missing: --loss clip was used with "
                    f"--lock-image-freeze-bn-stats, which drops the activation of {name}. Train without "
                    "that flag, or with --loss infonce"
                )


def _build(model: str, flags: Mapping[str, Any], config: Mapping[str, Any]) -> nn.Module:
    """The model as training made it: same architecture, same preprocessing, random weights."""
    extra = {k: config[k] for k in ("init_logit_bias",) if k in config}
    untrained = dict.fromkeys(("load_weights", "pretrained_image", "pretrained_text"), False)
    with errors_only():
        # The flags are called as the arguments are.
        trained, _, _ = open_clip.create_model_and_transforms(model, **untrained, **flags, **extra)
    return trained.eval()
