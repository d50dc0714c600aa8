"""The model card of an exported folder, README.md as the Hugging Face hub reads it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from otter_openclip import __version__

CARD_FILE = "README.md"
TASKS = {
    "zeroshot_classification": "zero-shot-image-classification",
    "zeroshot_multilabel": "zero-shot-image-classification",
    "zeroshot_retrieval": "image-text-retrieval",
}
# Of params.txt; data, logs and the like are places on the machine that trained.
SETTINGS = (
    "model pretrained loss epochs batch_size world_size accum_freq opt lr wd beta1 beta2 eps momentum "
    "warmup lr_scheduler grad_clip_norm precision seed lock_image lock_text reference_crop "
    "feature_dropout distill_model teacher_model"
).split()
# Of these some are paths.
PLACES = ("model", "pretrained", "distill_model", "teacher_model", "pair_weights")
CITED = ("ls", "kd", "otter")
TITLE = (
    "Data Efficient Language-Supervised Zero-Shot Recognition with Optimal Transport Distillation"
)
CITATION = f"""@inproceedings{{wu2022otter,
  title     = {{{TITLE}}},
  author    = {{Wu, Bichen and Cheng, Ruizhe and Zhang, Peizhao and Gao, Tianren and
               Gonzalez, Joseph E. and Vajda, Peter}},
  booktitle = {{International Conference on Learning Representations}},
  year      = {{2022}}
}}"""


def read_results(paths: Sequence[str | Path]) -> tuple[list[EvalResult], str]:
    """The metrics in result files of ``otter-openclip eval`` and ``clip_benchmark eval``, and of whom.

    ValueError names a file that is not one, has no finite metric or is of another model than the first,
    or says otherwise what another says of one set.
    """
    evaluated: dict[tuple, EvalResult] = {}
    models: dict[str, str | Path] = {}
    for path in paths:
        try:
            contents = json.loads(Path(path).read_text(encoding="utf-8"))
            dataset, metrics = contents["dataset"].removeprefix("wds/"), contents["metrics"]
            task = TASKS.get(contents["task"], contents["task"])
            numbers = {name: x for name, x in metrics.items() if isinstance(x, int | float)}
            numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
            names = [contents["model"], contents.get("pretrained")]
            model = ", ".join(_without_folders(name) for name in names if name)
            how = _how_measured(contents)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--results {path}: not a result file of otter-openclip eval or clip_benchmark eval "
                f"({type(error).__name__}: {error})"
            ) from error
        if not numbers:
            raise ValueError(f"--results {path}: no finite number among its metrics")
        models.setdefault(model, path)
        if len(models) > 1:
            listed = ", ".join(f"{path} is of {model}" for model, path in models.items())
            raise ValueError(f"--results: {listed}; a card is of one model")
        for name, value in numbers.items():
            result = EvalResult(
                task_type=task,
                dataset_type=re.sub(r"[^\w.-]+", "-", dataset).lower(),
                dataset_name=dataset,
                dataset_config=how,
                metric_type=name,
                metric_name=name,
                metric_value=value,
            )
            if evaluated.setdefault((task, dataset, how, name), result).metric_value != value:
                fault = f"another {name} of {dataset} than a file before"
                fix = "drop one; results of otter-openclip eval say how they were made"
                raise ValueError(f"--results {path} has {fault}; {fix}")
    return list(evaluated.values()), "".join(models)


def _how_measured(contents: Mapping[str, Any]) -> str | None:
    """Prompts, language and crop, as far as a result file says them."""
    prompts = contents.get("templates") or ""
    if not isinstance(prompts, str):  # with --dump_templates all of them
        prompts = prompts[0] if len(prompts) == 1 else f"{len(prompts)} templates"
    crop = "resized to 256, cropped to 224" if contents.get("reference_crop") else ""
    language = contents.get("language") or "en"
    parts = [prompts, crop, language if language != "en" else ""]
    return "; ".join(part for part in parts if part) or None


def read_settings(params: Mapping[str, str], entry: Mapping[str, Any]) -> dict[str, str]:
    """What of a run's ``params.txt`` and of its checkpoint's ``otter`` entry belongs into the card."""
    stated = {name: params[name] for name in SETTINGS if name in params}
    stated |= {name: str(value) for name, value in entry.get("settings", {}).items()}
    return {
        name: _without_folders(value) if name in PLACES else value
        for name, value in stated.items()
        if value not in ("", "None", "False")
    }


def _without_folders(value: str) -> str:
    """A path's last part: where it lies on this machine is nobody's business."""
    schema, colon, place = value.rpartition(":")
    local = schema == "local-dir" or Path(place).is_absolute() or Path(place).exists()
    return f"{schema}{colon}{Path(place).name}" if local else value


def model_card(
    name: str,
    load: str,
    *,
    weights: str,
    epoch: int | None,
    settings: Mapping[str, str],
    licence: str | None,
    results: Sequence[EvalResult],
    evaluated_as: str = "",
) -> str:
    """The card's text; ``load`` is what ``open_clip.create_model_and_transforms`` takes.

    ``settings`` are of `read_settings`, ``results`` and ``evaluated_as`` of `read_results`.
    """
    loss = settings.get("loss", "clip")
    data = ModelCardData(
        license=licence,
        library_name="open_clip",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "open_clip", *(["otter"] if loss == "otter" else [])],
        model_name=name,
        eval_results=list(results) or None,
    )
    of_epoch = "" if epoch is None else f" after epoch {epoch}"
    trained = _table(("setting", "value"), [(f"`{key}`", text) for key, text in settings.items()])
    how = [f" ({r.dataset_config})" if r.dataset_config else "" for r in results]
    rows = [
        (r.dataset_name + config, r.metric_name, f"{r.metric_value:.4f}")
        for r, config in zip(results, how, strict=True)
    ]
    measured = _table(("data", "metric", "value"), rows)
    measured = f"Evaluated as `{evaluated_as}`:\n\n{measured}" if rows else ""
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {name}",
        f"The {weights} of an open_clip training run with `--loss {loss}`{of_epoch}, exported with "
        f"otter-openclip {__version__}.",
        "## Use\n\nStock open_clip is enough:\n\n```python\nimport open_clip\n\n"
        f"model, _, preprocess = open_clip.create_model_and_transforms({load!r})\n"
        f"tokenizer = open_clip.get_tokenizer({load!r})\n```",
        f"## Training\n\n{trained or 'Settings: not recorded.'}\n\n"
        "Training data: not stated by the export.",
        f"## Evaluation\n\n{measured or 'No results were given.'}",
        f"## Licence\n\nOf the weights: {licence or 'not stated'}.",
    ]
    if loss in CITED:
        parts.append(f"## Citation\n\n```bibtex\n{CITATION}\n```")
    return "\n\n".join(parts) + "\n"


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown; "" without rows."""
    lines = [heads, ("---",) * len(heads), *rows] if rows else []
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
