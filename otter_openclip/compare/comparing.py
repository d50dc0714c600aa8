"""The ``compare`` command's course: towers and data, the study, what it leaves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import open_clip
import transformers
import yaml
from tqdm import tqdm

from otter_openclip.cli import USER_ERRORS
from otter_openclip.closed_form.two_towers import Towers
from otter_openclip.compare.findings import LABELS, page, table, verdict
from otter_openclip.compare.halves import CHOOSING, REPORTING, write_halves
from otter_openclip.compare.study import QUICK_STEPS, STEPS, Study
from otter_openclip.compare.trial import CLOSED_FORM, EVALUATIONS, FIT, Place, flags, quietly, run
from otter_openclip.files import write_json, write_text
from otter_openclip.frozen.encode import fill, fingerprint
from otter_openclip.model_folders.export import export_checkpoint
from otter_openclip.shards import read

HALVES, LOCK = "halves", ".lock"  # of a folder that this command has written
_SILENT = 10.0  # seconds of waiting for another process before it is said


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
) -> None:
    """Compare, and write the folder ``out``; the arguments are the command's, see its ``--help``.

    Raises:
        ValueError: for towers, pairs, a test set, a storage or a folder that cannot be used.
        RuntimeError: if nothing ended well, or in time.
    """
    deadline = time.monotonic() + 3600 * hours if hours else float("inf")
    transformers.logging.disable_default_handler()  # it prints a configuration in every run
    out = Path(out)
    if out.exists() and not (out / HALVES).is_dir():
        if not out.is_dir() or {path.name for path in out.iterdir()} - {LOCK}:
            raise ValueError(f"{out} exists and is no comparison; choose another folder")
    model = f"local-dir:{model}" if Path(model).is_dir() else model
    place = Place(model, train_data, {}, out)
    pairs, digest = _read_pairs(place)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        halves, images = write_halves(eval, out / HALVES)
        frozen, towers = _encode(place)
        place = replace(place, tests=halves, frozen=frozen)
        if methods and not frozen:
            raise ValueError(f"--methods {methods[0]} needs two towers under linear heads")
        methods = (methods or [FIT, f"{FIT}+otter"]) if frozen else []
        task = {"pairs": digest, "towers": towers, "test images": halves[CHOOSING].parent.name}
        task["space (--quick)"] = str(quick)
        study = Study(
            storage or str(out / "study.journal"),
            task,
            place,
            list(dict.fromkeys([*losses, *methods])),
            trials=trials or (5 if quick else 30),
            seeds=seeds or (2 if quick else 5),
            pairs=pairs,
            steps=QUICK_STEPS if quick else STEPS,
        )
        if methods:  # the closed form is made once, before others look for it
            run(FIT, CLOSED_FORM, place, 0)
    _work(study, deadline, f"--hours {hours}")
    with _locked(out):
        _leave(out, study, {"pairs": pairs, "test images": images})


def _locked(out: Path) -> contextlib.AbstractContextManager:
    lock = filelock.FileLock(out / LOCK)
    try:
        return lock.acquire(timeout=_SILENT)
    except filelock.Timeout:
        print(f"Waiting for another process in {out}")
        return lock.acquire()


def _read_pairs(place: Place) -> tuple[int, str]:
    """How many pairs there are, and a digest of the shards' names and sizes, alike on all machines."""
    count, digest = 0, hashlib.sha256()
    for shard in place.shards:
        try:
            for _, files in read.samples(shard, contents=False):
                count += "txt" in files and not files.keys().isdisjoint(read.TRAINING_IMAGES)
            digest.update(f"{Path(shard).name} {os.path.getsize(shard)}\n".encode())
        except OSError as error:
            raise ValueError(f"--train-data {shard}: {error}") from error
    if not count:
        raise ValueError(f"--train-data {place.train_data} has no image with a caption (txt)")
    return count, digest.hexdigest()[:16]


def _encode(place: Place) -> tuple[bool, str]:
    """Whether the model is two towers, what they give for the pairs then being kept; and its digest."""
    try:
        towers = Towers(place.model.removeprefix("local-dir:"), place.work / "features")
    except ValueError:
        try:
            return False, fingerprint({}, open_clip.create_model(place.model).state_dict())
        except USER_ERRORS as error:
            raise ValueError(f"--model {place.model}: {error}") from error
    workers = min(8, (os.cpu_count() or 1) // 2)
    fill([towers.images, towers.texts], place.shards, device=towers.device, workers=workers)
    return True, fingerprint({}, towers.model.state_dict())


def _work(study: Study, deadline: float, hours: str) -> None:
    """Do what is missing, as long as there is time, with a bar."""
    began, repeats = time.monotonic(), study.seeds * len(study.methods)
    everything, before = study.trials * len(study.tuned) + repeats, study.count()
    shown = sys.stderr  # a run's own is not
    with tqdm(total=everything, initial=before, unit="run") as bar:

        def said(method: str, epoch: int, value: float) -> None:
            bar.set_description(f"{LABELS[method]}, mAP {100 * value:.1f}")
            if not study.place.frozen and epoch == 1 and study.count() == before:
                seconds = (time.monotonic() - began) * EVALUATIONS
                bar.write(
                    f"The towers are trained: a trial takes up to {seconds / 60:.1f} minutes, and all "
                    f"{everything} runs {seconds * everything / 3600:.1f} hours",
                    file=shown,
                )

        def go_on(step: Callable[[], bool], runs_left: int) -> None:
            while time.monotonic() + runs_left * study.mean_seconds() < deadline and step():
                bar.update(study.count() - bar.n)

        # One run more is the one that leaves the model.
        go_on(lambda: study.tune_next(said), repeats + 1)
        study.choose()
        go_on(study.repeat_next, 2)
    if not study.results():
        late = f"{hours}: no method came to its end in that time; the same command goes on"
        errors = study.failed or study.errors
        raise RuntimeError("; ".join(dict.fromkeys(errors.values())) or late)


def _leave(out: Path, study: Study, facts: dict[str, Any]) -> None:
    """Write what a comparison leaves."""
    results, place = study.results(), study.place
    rows = table(results, CHOOSING, REPORTING)
    (out / "recipes").mkdir(exist_ok=True)
    reporting = replace(place, tests={REPORTING: place.tests[REPORTING]})
    for row in rows:
        recipe = flags(row["method"], study.setting(row["method"]), reporting)
        row["setting"] = study.setting(row["method"])
        text = yaml.safe_dump(recipe, sort_keys=False)
        write_text(out / "recipes" / f"{row['method']}.yaml", text)
    best = rows[0]["method"]
    path = out / "results.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else None
    if before != json.loads(json.dumps(rows)) or not (out / "model").is_dir():
        with tempfile.TemporaryDirectory(dir=out) as logs:
            run(best, study.setting(best), place, 0, logs=Path(logs))
            with quietly():
                export_checkpoint(Path(logs) / "run", out / "model", overwrite=True)
    more = {"failed": study.failed, "importance": study.importances()}
    record = {"verdict": verdict(rows), **facts, "trials": study.trials_each, "rows": rows, **more}
    write_json(path, record)
    text = (
        f"{facts['pairs']:,} pairs of {place.train_data}. Every loss was tuned by {study.trials_each} "
        f"trials over one space, by mAP on half of {facts['test images']:,} images; figures are of "
        "the other half."
    )
    html = page("Does it help on these pairs?", text, {"": rows}, place, results, **more)
    write_text(out / "report.html", html)
    print(f"{record['verdict']}\nWrote {out}; open {out / 'report.html'}")
