"""The ``compare`` command's course: towers and data, the study, what it leaves."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import filelock
import open_clip
import torch
import transformers
import yaml
from open_clip_train.data import expand_urls
from tqdm import tqdm

from otter_openclip.closed_form.fitting_run import FIT_FILE, Towers
from otter_openclip.compare import figures
from otter_openclip.compare import trial as runs
from otter_openclip.compare.comparison_page import PICTURES, Panel, page
from otter_openclip.compare.halves import HALVES, read_labelled, write_halves
from otter_openclip.compare.study import QUICK_STEPS, STEPS, Study
from otter_openclip.compare.trial import FIT, Place
from otter_openclip.files import write_json, write_text
from otter_openclip.frozen.encode import fill, fingerprint
from otter_openclip.model_folders.export import export_checkpoint
from otter_openclip.shards import read

TASK_FILE, JOURNAL = "task.json", "study.journal"
FULL, QUICK = (30, 5), (6, 2)  # trials of each method, seeds


def compare(
    out: str | Path,
    *,
    model: str,
    train_data: str,
    eval: str,
    losses: Sequence[str],
    methods: Sequence[str] | None = None,
    trials: int | None = None,
    seeds: int | None = None,
    hours: float | None = None,
    storage: str | None = None,
    quick: bool = False,
    workers: int = 1,
) -> None:
    """Compare, and write the folder ``out``; the arguments are the command's, see its ``--help``.

    Raises:
        ValueError: for towers, pairs, a test set, a storage or a folder that cannot be used.
        RuntimeError: if nothing ended well, or not in time.
    """
    deadline = time.monotonic() + 3600 * hours if hours else None
    transformers.logging.disable_default_handler()  # it prints a configuration in every run
    out = Path(out)
    if out.exists() and not (out.is_dir() and ((out / TASK_FILE).is_file() or not any(out.iterdir()))):
        raise ValueError(f"{out} exists and is not a comparison of this command; choose another folder")
    samples, classes = read_labelled(eval)
    shards = list(dict.fromkeys(expand_urls(train_data)[0]))
    pairs = _count(shards, train_data)
    model = f"local-dir:{model}" if Path(model).is_dir() else model
    out.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(out / ".lock"):
        towers, digest = _towers(model, out)
        task = {
            "towers": digest,
            "pairs": [[Path(shard).name, Path(shard).stat().st_size] for shard in shards],
            "test images": _digest(samples),
            "budget": "quick" if quick else "full",
        }
        _check_task(out, task)
        halves = write_halves(samples, eval, out / "halves")
        place = Place(model, train_data, halves, out, towers is not None, workers)
        shown = runs.labelled(halves[HALVES[1]], PICTURES)
        place.pictures = [picture for picture, _ in shown]
        if methods is None:
            methods = [FIT, f"{FIT}+otter"] if place.frozen else []
        elif methods and not place.frozen:
            raise ValueError(f"--methods {methods[0]} needs two towers under linear heads, unlike {model}")
        if towers is not None:
            fill([towers.images, towers.texts], shards, device=_device(), workers=workers)
            del towers
        if methods:  # the closed form is made once, before others look for it
            runs.run(FIT, runs.closed_form(), place, 0)
    budget = QUICK if quick else FULL
    study = Study(
        storage or str((out / JOURNAL).resolve()),
        task,
        place,
        list(dict.fromkeys([*losses, *methods])),
        pairs=pairs,
        trials=trials or budget[0],
        seeds=seeds or budget[1],
        steps=QUICK_STEPS if quick else STEPS,
    )
    _work(study, deadline, hours)
    with filelock.FileLock(out / ".lock"):
        _leave(out, study, shown, {"pairs": pairs, "classes": classes, "test images": len(samples)})


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _count(shards: Sequence[str], train_data: str) -> int:
    """How many pairs there are."""
    if train_data.endswith((".csv", ".tsv")):
        raise ValueError(
            f"--train-data {train_data} is a table; build shards of it with otter-openclip data csv"
        )
    count = 0
    for shard in tqdm(shards, "Counting pairs", unit="shard", leave=False):
        try:
            for _, files in read.samples(shard, contents=False):
                count += "txt" in files and any(kind in files for kind in read.TRAINING_IMAGES)
        except OSError as error:
            raise ValueError(f"--train-data {shard}: {error}") from error
    if not count:
        raise ValueError(f"--train-data {train_data} has no image with a caption (txt)")
    return count


def _towers(model: str, out: Path) -> tuple[Towers | None, str]:
    """The towers, if they are two under linear heads, and a digest of the model."""
    precision = "fp32" if _device().type == "cpu" else "amp"
    try:
        towers = Towers(model.removeprefix("local-dir:"), out / "features", precision, _device())
        return towers, fingerprint({}, towers.model.state_dict())
    except ValueError:
        try:
            return None, fingerprint({}, open_clip.create_model(model).state_dict())
        except (RuntimeError, OSError) as error:
            raise ValueError(f"--model {model}: {error}") from error


def _digest(samples: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for _, files in samples:
        for content in files.values():
            digest.update(content)
    return digest.hexdigest()[:16]


def _check_task(out: Path, task: dict[str, Any]) -> None:
    path = out / TASK_FILE
    before = json.loads(path.read_text()) if path.is_file() else task
    if different := [name for name, value in task.items() if before.get(name) != value]:
        raise ValueError(f"{out} is a comparison of other {' and '.join(different)}; choose another")
    write_json(path, task)


def _work(study: Study, deadline: float | None, hours: float | None) -> None:
    """Do what is missing, as long as there is time, with a bar."""
    everything = len(study.tuned) * study.trials + study.seeds * len(study.methods)
    began = time.monotonic()

    def left(reserve: float = 0.0) -> bool:
        return deadline is None or time.monotonic() + reserve < deadline

    with tqdm(total=everything, initial=sum(study.counts()), unit="run") as bar:

        def said(method: str, epoch: int, value: float) -> None:
            bar.set_description(f"{runs.label(method)}, mAP {100 * value:.1f}")
            if not study.place.frozen and epoch == 1 and bar.n == bar.initial:
                whole = (time.monotonic() - began) * runs.EVALUATIONS
                bar.write(
                    f"The towers are not frozen: a trial takes up to {whole / 60:.1f} minutes, "
                    f"all {everything} runs {whole * everything / 3600:.1f} hours"
                )

        def go_on(step: Callable[[], bool], reserve: Callable[[], float]) -> None:
            while left(reserve()) and step():
                bar.n = sum(study.counts())
                bar.refresh()

        repeats = study.seeds * len(study.methods)
        go_on(lambda: study.tune_next(said), lambda: repeats * study.mean_seconds())
        study.choose()
        if study.tuned and not study.trials_each:
            raise RuntimeError(_too_short(hours))
        go_on(study.repeat_next, lambda: 0.0)
        bar.n = bar.total
    if not study.results():
        failures = "; ".join(f"{m}: {error}" for m, error in study.failed.items())
        raise RuntimeError(failures if study.failed and not study.tuned else _too_short(hours))


def _too_short(hours: float | None) -> str:
    return f"--hours {hours}: no trial of each method ended in that time; the same command goes on"


def _leave(out: Path, study: Study, shown: Sequence[Any], facts: dict[str, Any]) -> None:
    """Write what a comparison leaves."""
    results = study.results()
    rows = figures.table(results, HALVES[1], HALVES[0])
    recipes = out / "recipes"
    recipes.mkdir(exist_ok=True)
    for row in rows:
        method = row["method"]
        row["setting"] = study.setting(method)
        recipe = runs.flags(method, row["setting"], study.place)
        recipe["zeroshot-data"] = [str(study.place.tests[HALVES[1]])]
        text = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None)
        write_text(recipes / f"{method}.yaml", f"# otter-openclip train --config {method}.yaml\n{text}")
    best = rows[0]["method"]
    with tempfile.TemporaryDirectory(dir=out) as logs:
        runs.run(best, study.setting(best), study.place, 0, logs=Path(logs))
        with runs.quietly():
            export_checkpoint(Path(logs) / "run", out / "model", overwrite=True)
    record = {
        "verdict": figures.verdict(rows),
        **facts,
        "trials": study.trials_each,
        "seeds": study.seeds,
        "rows": rows,
        "failed": study.failed,
        "importance": study.importances(),
    }
    write_json(out / "results.json", record)
    names = {m: r["names"] for (m, seed), r in results.items() if seed == 0}
    text = (
        f"{facts['pairs']:,} pairs of {study.place.train_data}; every loss was tuned by "
        f"{study.trials_each} trials over one space, by mAP on half of {facts['test images']:,} test "
        "images. Figures are of the other half."
    )
    panel = Panel("", rows, record["verdict"])
    html = page("Does it help on these pairs?", text, [panel], shown, names, record, _classes(study))
    write_text(out / "report.html", html)
    print(f"{record['verdict']}\nWrote {out}; open {out / 'report.html'}")


def _classes(study: Study) -> list[str]:
    return (study.place.tests[HALVES[1]] / "classnames.txt").read_text(encoding="utf-8").splitlines()
