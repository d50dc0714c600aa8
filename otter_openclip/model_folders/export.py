"""Turn a training checkpoint into a folder for stock open_clip; ``export_command`` has the flags."""

from __future__ import annotations

import ast
import copy
import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import parse_model_name
from open_clip.pretrained import get_pretrained_cfg
from torch import Tensor, nn

from otter_openclip.checkpoints.contents import ENTRY, JUDGED, JUDGED_WEIGHTS, TEACHER
from otter_openclip.checkpoints.newest import newest_checkpoint, read_checkpoint
from otter_openclip.model_folders.card import (
    CARD_FILE,
    check_licence,
    model_card,
    read_results,
    read_settings,
)
from otter_openclip.model_folders.export_command import MODEL_FLAGS, WEIGHTS, dest
from otter_openclip.model_folders.fitting import with_counters
from otter_openclip.model_folders.folder import (
    CONFIG_FILE,
    check_out,
    check_state,
    errors_only,
    load_weights,
    write_folder,
)
from otter_openclip.model_folders.parts import check_moved
from otter_openclip.model_folders.publish import check_repository, push
from otter_openclip.preprocessing import CROP_PCT
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
    check_licence(license)
    if push_to_hub is not None:
        check_repository(push_to_hub)
        if license is None:
            raise ValueError(
                "--push-to-hub needs --license: the licence of your weights is yours to say, e.g. "
                "--license cc-by-nc-4.0, or other"
            )
    elif private:
        raise ValueError("--private is for --push-to-hub OWNER/NAME; give that too, or drop it")
    evaluated = read_results(results)
    check_out(out, overwrite, path, *map(Path, results))
    model, flags = _settings(path, model, flags)
    config = _model_config(model, flags)
    contents = read_checkpoint(path)
    weights = _which_weights(contents, path, weights, report)
    state = _weights_of(contents, path, weights)
    if "logit_bias" in state:  # --siglip
        config.setdefault("init_logit_bias", -10)
    report(f"Exporting the {weights} of {path} as {model}")
    report(f"Model flags: {_spelled(flags) or 'none'}")

    trained = _build(model, flags, config)
    state = with_counters(state, trained)
    load_weights(
        trained,
        state,
        f"{path} does not fit the model {model}",
        "It was trained under another --model or with --force flags that were not given here",
    )
    tokenizer = open_clip.get_tokenizer(model, context_length=flags.get("force_context_length"))

    noted = {"crop_pct": CROP_PCT} if flags.get("reference_crop") else None
    card = model_card(
        push_to_hub or out.resolve().name,
        f"local-dir:{out.name}" if push_to_hub is None else f"hf-hub:{push_to_hub}",
        weights=weights,
        epoch=contents.get("epoch"),
        settings=read_settings(_params_lines(path) | {"model": model}, contents.get(ENTRY, {})),
        licence=license,
        results=evaluated,
    )
    write_folder(out, trained, config, state, tokenizer, noted, {CARD_FILE: card})
    if noted:
        report(
            "Stock open_clip's preprocessing has no resize larger than the crop and ignores crop_pct: "
            "for the reference's, evaluate with --reference_crop"
        )
    if push_to_hub is not None:
        report(push(out, push_to_hub, private=private))
    return out


def _spelled(flags: Mapping[str, Any]) -> str:
    """``flags`` as on a command line."""
    words = []
    for name, value in flags.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value) if isinstance(value, list | tuple) else [str(value)]
    return " ".join(words)


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
    path: Path, model: str | None, given: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Model name and flags: those given, then params.txt's, then of the run's --pretrained tag."""
    unknown = given.keys() - {dest(flag) for flag in MODEL_FLAGS}
    if unknown:
        raise TypeError(f"export_checkpoint has no argument {', '.join(sorted(unknown))}")
    given = {k: _plain(k, v) for k, v in given.items() if v is not None and v is not False}
    recorded = _read_params(path)
    trained_as, tag = recorded.pop("model", None), recorded.pop("pretrained", None)
    model = model or trained_as
    if model is None:
        raise ValueError(
            f"no params.txt beside {path} names its model; pass --model with the name used in training"
        )
    for name, value in {"model": model, **given}.items():
        then = trained_as if name == "model" else recorded.get(name)
        if trained_as is not None and value != then:
            used = _spelled({name: value})
            logging.warning(f"using {used}, but the run's params.txt has {name}: {then}")
    flags = {**_tag_flags(trained_as, tag), **recorded, **given}
    for name in ("image_mean", "image_std"):
        if name in flags and len(flags[name]) not in (1, 3):
            raise ValueError(f"--{name.replace('_', '-')} takes 1 or 3 numbers, got {flags[name]}")
    return model, flags


def _read_params(path: Path) -> dict[str, Any]:
    """Model, ``--pretrained`` and model flags from the ``params.txt`` that training leaves."""
    if not (lines := _params_lines(path)):
        return {}
    params: dict[str, Any] = {
        name: lines[name] for name in ("model", "pretrained") if name in lines
    }
    for name in map(dest, MODEL_FLAGS):
        text = lines.get(name, "None")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if value not in (None, False):
            params[name] = _plain(name, value)
    return params


def _params_lines(path: Path) -> dict[str, str]:
    for folder in (path.absolute().parent, path.resolve().parent):  # a link may lead to the run
        file = folder.parent / "params.txt"
        if folder.name == "checkpoints" and file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
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
    tag_flags = {f"image_{key}": config.get(key) for key in PREPROCESSING}
    return {k: _plain(k, v) for k, v in tag_flags.items() if v is not None}


def _which_weights(
    contents: Mapping[str, Any], path: Path, given: str | None, report: Callable[[str], None]
) -> str:
    """The weights to take: those given, then those that a best.pt was chosen by."""
    if given is not None and given not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {given!r}")
    judged = contents.get(JUDGED)
    judged = judged.get(JUDGED_WEIGHTS) if isinstance(judged, Mapping) else None
    if judged not in WEIGHTS:
        return given or WEIGHTS[0]
    if given not in (None, judged):
        logging.warning(
            f"{path} is the best epoch of the {judged}, not of the {given}; --weights {judged} exports "
            "what was evaluated"
        )
    if given is None:
        report(f"{path} is the best epoch of the {judged}; --weights takes others")
    return given or judged


def _weights_of(contents: Mapping[str, Any], path: Path, weights: str) -> dict[str, Tensor]:
    if weights == "student":
        return check_state(contents.get("state_dict", contents), path, weights)
    entry = contents.get(ENTRY, {})
    if "teacher_state" not in entry:
        loss = entry.get("settings", {}).get("loss", "clip")
        raise ValueError(
            f"{path} has no EMA teacher (its run used --loss {loss}, or a fixed teacher); --loss kd "
            "and otter without --distill-model have one, and --loss clip with --ema-decay; use "
            "--weights student"
        )
    return check_state(contents[TEACHER], path, weights)


def _model_config(model: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The model's JSON with training's ``--force`` flags written into it."""
    config = copy.deepcopy(_base_config(model))
    if "force_image_size" in flags:
        config["vision_cfg"]["image_size"] = flags["force_image_size"]
    if "force_context_length" in flags:
        config["text_cfg"]["context_length"] = flags["force_context_length"]
    if "force_quick_gelu" in flags:
        config["quick_gelu"] = True
    if "force_custom_text" in flags:
        config["custom_text"] = True
    # Towers' own weights are never wanted: those of the folder replace them.
    for part, name, key in (
        ("vision_cfg", "timm_model_name", "timm_model_pretrained"),
        ("text_cfg", "hf_model_name", "hf_model_pretrained"),
    ):
        if name in config[part]:
            config[part][key] = False
    return config


def _base_config(model: str) -> dict[str, Any]:
    check_moved(model)
    if parse_model_name(model)[0] is not None:
        try:
            config = open_clip.get_model_config(model)
            if not {"vision_cfg", "text_cfg"} <= config.keys():
                raise ValueError(f"no model_cfg in {CONFIG_FILE}")
        except Exception as error:  # files, JSON, network
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"no model configuration from {model} ({reason}); pass --model with its present place"
            ) from error
        return config
    config = open_clip.get_model_config(model.replace("/", "-"))
    if config is None:
        near = difflib.get_close_matches(model, open_clip.list_models(), n=3, cutoff=0.5)
        hint = (
            f"did you mean {', '.join(near)}?" if near else "open_clip.list_models() has the names."
        )
        raise ValueError(
            f"open_clip knows no model {model!r}; {hint} A model of your own can be given as "
            f"local-dir:FOLDER, with its {CONFIG_FILE} in the folder"
        )
    return config


def _build(model: str, flags: Mapping[str, Any], config: Mapping[str, Any]) -> nn.Module:
    """The model as training made it: same architecture, same preprocessing, random weights."""
    extra = {k: config[k] for k in ("init_logit_bias",) if k in config}
    with errors_only():
        trained, _, _ = open_clip.create_model_and_transforms(
            model,
            load_weights=False,
            pretrained_image=False,
            pretrained_text=False,
            force_image_size=flags.get("force_image_size"),
            force_context_length=flags.get("force_context_length"),
            force_quick_gelu=flags.get("force_quick_gelu", False),
            force_custom_text=flags.get("force_custom_text", False),
            image_mean=_triple(flags.get("image_mean")),
            image_std=_triple(flags.get("image_std")),
            image_interpolation=flags.get("image_interpolation"),
            image_resize_mode=flags.get("image_resize_mode"),
            **extra,
        )
    return trained.eval()


def _triple(values: list[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values) * (3 if len(values) == 1 else 1)
