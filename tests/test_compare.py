"""``otter-openclip compare`` on tiny towers: the study, what it leaves, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import filelock
import forks
import open_clip
import optuna
import pytest
import torch
from conftest import CLASSES, npy, write_set
from data_helpers import samples
from test_zeroshot_training import files_of
from training_helpers import parse_args

from otter_openclip import cli
from otter_openclip.compare import comparing, findings, study, trial
from otter_openclip.compare.halves import CHOOSING, REPORTING, write_halves
from otter_openclip.compare.trial import CLOSED_FORM, FIT, Place, run

BATCHES, STEPS = (16, 24), (5, 10)


@pytest.fixture
def words(model, pairs, labelled, monkeypatch):
    """A command line but for its folder, whose trials are short."""
    monkeypatch.setattr(study, "BATCHES", BATCHES)
    monkeypatch.setattr(study, "QUICK_STEPS", STEPS)
    shards = str(pairs / "{00000..00001}.tar")
    line = ["--model", f"local-dir:{model}", "--train-data", shards, "--eval", str(labelled)]
    return [*line, "--quick", "--trials", "2", "--seeds", "2", "--losses", "infonce", "otter"]


def compare(out, words, *more):
    return cli.main(["compare", str(out), *words, *map(str, more)])


def results(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def trials(name, storage):
    if "://" not in (storage := str(storage)):
        backend = optuna.storages.journal.JournalFileBackend(storage)
        storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(storage=storage, study_name=f"otter-openclip compare: {name}").trials


def test_what_a_comparison_leaves(words, model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert compare(out, words) == 0
    assert results(out)["verdict"] in capsys.readouterr().out
    rows = {row["method"]: row for row in results(out)["rows"]}
    assert rows.keys() == {"infonce", "otter", "fit", "fit+otter"}
    choosing = [row["choosing"] for row in rows.values()]
    assert choosing == sorted(choosing, reverse=True)
    assert all(row["seeds"] == 2 for row in rows.values()) and results(out)["pairs"] == 72
    for row in rows.values():
        assert len(row["course"]) == (1 if row["method"] == "fit" else trial.EVALUATIONS)
        assert row["course"][-1][1] == pytest.approx(row["mAP"][0])
        parse_args(f"--config {out}/recipes/{row['method']}.yaml")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 12 and "http" not in page.replace("http-equiv", "")
    assert all(findings.LABELS[method] in page for method in rows)
    # The figures of a row are those of stock open_clip's model, on the half that chose it.
    folder = next((out / "halves").glob("*/reporting"))
    line = f"eval --model local-dir:{out / 'model'} --pretrained= --dataset wds/half --no_amp"
    line += f" --num_workers 0 --dataset_root {folder} --output {tmp_path / 'eval.json'}"
    assert cli.main(line.split()) == 0
    metrics = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["metrics"]
    repeats = [trial.user_attrs for trial in trials("seeds", out / "study.journal")]
    best = rf"{re.escape(next(iter(rows)))}, trial \d+, seed 0"
    (first,) = (each["outcome"] for each in repeats if re.fullmatch(best, each["repeat"]))
    found = first["metrics"][REPORTING]["mAP"]
    assert found == pytest.approx(metrics["mean_average_precision"], abs=1e-5)
    # All is there: nothing is trained.
    done = []
    monkeypatch.setattr(study, "run", lambda *args, **more: done.append(args))
    monkeypatch.setattr(comparing, "run", lambda *args, logs=None: logs and done.append(args))
    assert compare(out, words) == 0 and not done


@pytest.fixture(params=["journal", pytest.param("postgresql", marks=pytest.mark.slow)])
def storage(request, tmp_path):
    """A file, or a PostgreSQL server on a socket of its own; Debian's package ``postgresql`` has one."""
    if request.param == "journal":
        yield str(tmp_path / "shared.journal")
        return
    folder = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    user = "postgres" if os.geteuid() == 0 else None  # the server does not run as root
    with tempfile.TemporaryDirectory() as place:
        shutil.chown(place, user) if user else None
        data = f"{place}/data"
        serving = f"-D {data} -o '-k {place} -c listen_addresses=' -l {place}/log -w"
        for command in (f"initdb -D {data} -A trust -U otter", f"pg_ctl start {serving}"):
            subprocess.run(f"{folder}/{command}", shell=True, check=True, user=user, cwd="/")
        yield f"postgresql+psycopg://otter@/postgres?host={place}"
        subprocess.run([folder / "pg_ctl", "stop", "-D", data], check=True, user=user, cwd="/")


def test_two_processes_share_a_study(words, tmp_path, storage):
    """Each with a folder of its own; together they do no more than is wanted, and say the same."""
    code = (
        f"from otter_openclip.compare import study; study.BATCHES = {BATCHES};"
        f"study.QUICK_STEPS = {STEPS}; from otter_openclip import cli; import sys;"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    commands = [
        ("-c", code, "compare", tmp_path / name, *words, "--trials", "3", "--storage", storage)
        for name in ("one", "two")
    ]
    done = forks.together(commands, [{}, {}])
    assert [each.returncode for each in done] == [0, 0], [each.stderr[-2000:] for each in done]
    one, two = (results(tmp_path / name) for name in ("one", "two"))
    assert one["rows"] == two["rows"]
    for name in ("infonce", "otter", "fit+otter"):
        joined = trials(name, storage)
        assert 3 <= len(joined) <= 4  # both may begin a last one at the same moment
        assert len({trial.params["lr"] for trial in joined}) >= 3


def test_a_killed_one_goes_on(words, tmp_path, monkeypatch):
    out, stock, count = tmp_path / "out", study.run, 0

    def killed(*args, **more):
        nonlocal count
        count += 1
        if count in (2, 5):
            raise KeyboardInterrupt  # as SIGKILL, this leaves its trial in the midst
        return stock(*args, **more)

    monkeypatch.setattr(study, "run", killed)
    storage = f"sqlite:///{tmp_path}/study.db"
    words = [*words[:-2], "otter", "--methods", "fit", "--storage", storage]
    for _ in range(2):
        assert compare(out, words) == 130
    assert compare(out, words) == 0
    assert count == 2 + 2 + 3  # what was killed is done again, and nothing else
    _, lost, again = trials("otter", storage)
    assert lost.params == again.params and lost.state.name == "RUNNING"
    assert {row["seeds"] for row in results(out)["rows"]} == {2}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """A study whose runs take no time; ``values`` by method, an exception for a run that fails."""
    values = {}

    def quick(method, setting, place, seed, *, report=None, **more):
        value = values.get(method, 0.5)
        if isinstance(value, Exception):
            raise value
        value = value if isinstance(value, float) else value(setting)
        for epoch in range(1, trial.EVALUATIONS + 1):
            report and report(epoch, value)
        metrics = {test: dict.fromkeys(trial.METRICS, value) for test in place.tests}
        return {"metrics": metrics, "course": [(1, value)], "names": []}

    monkeypatch.setattr(study, "run", quick)
    place = Place("model", "0.tar", {CHOOSING: tmp_path, REPORTING: tmp_path}, tmp_path)

    def make(methods, trials=8):
        budget = {"trials": trials, "seeds": 3, "pairs": 999, "steps": (20, 600)}
        made = study.Study(str(tmp_path / "journal"), {"pairs": "a"}, place, methods, **budget)
        return made, values

    return make


def test_every_loss_gets_as_many_trials_of_one_space(opened):
    made, _ = opened(["infonce", "ls", "kd", "otter", "fit", "fit+otter"])
    while made.tune_next(print):
        counts = {len(made.studies[m].trials) for m in made.tuned}
        assert max(counts) - min(counts) <= 1
    first = {m: [t.params for t in made.studies[m].trials[:8]] for m in made.tuned}
    shared = ("lr", "steps", "init-logit-scale", "wd", "batch-size", "feature-dropout")
    alike = {m: [[p[name] for name in shared] for p in params] for m, params in first.items()}
    assert len({json.dumps(params) for params in alike.values()}) == 1
    own = {m: params[0].keys() - set(shared) for m, params in first.items()}
    assert own == {
        "infonce": set(),
        "ls": {"label-smoothing"},
        "kd": {"alpha", "distill-T-t"},
        "otter": {"alpha", "sinkhorn-lambda"},
        "fit+otter": {"alpha", "sinkhorn-lambda"},
    }


def test_the_best_setting_is_chosen_once_and_repeated(opened):
    made, values = opened(["infonce", "otter", "fit"])
    values |= {m: lambda setting: setting["lr"] for m in ("infonce", "otter")}
    while made.tune_next(print):
        pass
    made.choose()
    rates = [t.params["lr"] for t in made.studies["otter"].trials]
    assert made.setting("otter")["lr"] == max(rates) and made.setting("fit") == CLOSED_FORM
    while made.repeat_next():
        pass
    assert Counter(m for m, _ in made.results()) == {"infonce": 3, "otter": 3, "fit": 1}
    # Others may have added a better trial since: what was chosen stays.
    values["otter"] = 1.0
    longer, _ = opened(["infonce", "otter", "fit"], trials=9)
    while longer.tune_next(print):
        pass
    again, _ = opened(["infonce", "otter", "fit"])
    again.choose()
    longer.choose()
    assert again.chosen == made.chosen != longer.chosen and not again.repeat_next()


def test_hopeless_trials_stop_and_failing_methods_are_given_up(opened):
    made, values = opened(["infonce", "kd", "ls"], trials=12)
    values |= {"infonce": lambda setting: 0.03 - setting["lr"], "kd": RuntimeError("diverged")}
    while made.tune_next(print):
        pass
    states = Counter(t.state.name for t in made.studies["infonce"].trials)
    assert states["PRUNED"] and states["COMPLETE"] + states["PRUNED"] == 12
    assert made.failed == {"kd": "diverged"}
    assert len(made.studies["kd"].trials) == study.FAILURES_TO_GIVE_UP
    made.choose()
    assert made.chosen.keys() == {"infonce", "ls"} and made.trials_each == 12


def test_what_failed_is_tried_again_by_the_next_command(opened):
    found = []
    for step in ("tune", "repeat"):
        for value in (RuntimeError("No space left on device"), 0.5):
            made, values = opened(["infonce"])
            values["infonce"] = value
            made.choose()
            while made.repeat_next() if step == "repeat" else made.tune_next(print):
                pass
            found.append((len(made.failed), len(made.errors), len(made.results())))
    assert found == [(1, 3, 0), (0, 0, 0), (0, 3, 0), (0, 0, 3)]


def test_hours_leave_time_for_the_model(opened, monkeypatch):
    made, _ = opened(["infonce"])
    monkeypatch.setattr(made, "mean_seconds", lambda: 1000.0)
    deadline = time.monotonic() + 3900  # three repeats and the model take 4000
    with pytest.raises(RuntimeError, match="--hours 1: no method"):
        comparing._work(made, deadline, "--hours 1")


def test_who_waits_for_another_process_says_so(tmp_path, monkeypatch, capsys):
    def acquire(lock, timeout=None):
        if timeout:
            raise filelock.Timeout("lock")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    comparing._locked(tmp_path)
    assert f"Waiting for another process in {tmp_path}" in capsys.readouterr().out


def test_paired_differences_by_hand():
    found = {}
    for method, values in {"infonce": (0.4, 0.8), "otter": (0.5, 0.7, 0.1), "fit": (0.9,)}.items():
        for seed, value in enumerate(values):
            metrics = dict.fromkeys(trial.METRICS, value)
            found[method, seed] = {"metrics": {"a": metrics}, "course": [(10, 0.1)]}
    fit, infonce, otter = findings.table(found, "a", "a")
    assert otter["difference"] == pytest.approx((0.0, 200**0.5)) and otter["ahead"] == 1
    assert (otter["seeds"], otter["of"]) == (3, 2) and "difference" not in infonce
    assert infonce["mAP"] == pytest.approx((60, 800**0.5)) and fit["ahead"] == 2
    assert findings.verdict([fit, infonce, otter]) == (
        "Best is closed form, mAP 90.0; +30.0 against InfoNCE ± 28.3, ahead with 2 of 2 seeds; "
        "OTTER +0.0 against InfoNCE ± 14.1, ahead with 1 of 2 seeds."
    )


def test_halves_share_no_image(labelled, tmp_path):
    """Of pictures with one label, too."""
    whole = {k: files["png"] for k, files in samples(labelled / "test" / "0.tar").items()}
    shard = {f"{k}.png": content for k, content in whole.items()}
    shard |= {f"{k}.cls": b"%d" % (n % 2) for n, k in enumerate(whole)}
    single = write_set(tmp_path / "one", [dict(sorted(shard.items()))], CLASSES, "classification")
    halves, count = write_halves(str(single), tmp_path / "halves")
    parts = [list(samples(folder / "test" / "0.tar").values()) for folder in halves.values()]
    assert sorted(files["png"] for part in parts for files in part) == sorted(whole.values())
    assert [len(part) for part in parts] == [15, 15] and count == 30
    assert (halves[CHOOSING] / "dataset_type.txt").read_text(encoding="utf-8") == "multilabel"


def test_heads_are_drawn_by_the_seed_and_the_closed_form_is_left(model, pairs, labelled, tmp_path):
    shards = str(pairs / "{00000..00001}.tar")
    place = Place(f"local-dir:{model}", shards, {"a": labelled}, tmp_path)
    setting = {"lr": 0.0, "steps": 5, "batch-size": 12, "init-logit-scale": 1.5}
    states = []
    for seed in (0, 0, 1):
        run("infonce", setting, place, seed, logs=tmp_path / f"{len(states)}")
        path = tmp_path / f"{len(states)}" / "run" / "checkpoints" / "epoch_5.pt"
        states.append(torch.load(path, weights_only=True)["state_dict"])
    name = "visual.head.proj.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])
    assert states[0]["logit_scale"].item() == 1.5
    first = run(FIT, CLOSED_FORM, place, 0, name_pictures=True)
    assert first["metrics"] == run(FIT, CLOSED_FORM, place, 1)["metrics"]
    assert len(first["names"]) == 12 and len(first["names"][0]) == trial.NAMES
    with pytest.raises(RuntimeError, match="argument --lr: invalid float value"):
        run("infonce", setting | {"lr": "much"}, place, 0)


def test_towers_that_are_trained(pairs, labelled, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(study, "BATCHES", (24,))
    monkeypatch.setattr(study, "QUICK_STEPS", STEPS)
    line = f"--model tiny-vit --train-data {pairs}/00000.tar --eval {labelled} --quick --trials 1"
    words = [*line.split(), "--seeds", "1", "--losses", "infonce"]
    assert compare(tmp_path / "out", words) == 0
    assert re.search(r"a trial takes up to 0\.\d minutes, and all 2 runs", capfd.readouterr().err)
    assert open_clip.create_model(f"local-dir:{tmp_path / 'out' / 'model'}").visual is not None
    assert compare(tmp_path / "other", [*words, "--methods", "fit"]) == 2
    assert "--methods fit needs two towers under linear heads" in capfd.readouterr().err


def test_what_is_refused(words, labelled, pairs, tmp_path, capsys, monkeypatch):
    files = files_of(labelled / "test" / "0.tar")
    first = npy([1] + [0] * (len(CLASSES) - 1))
    write_set(tmp_path / "few", [dict(list(files.items())[: 2 * 12])], CLASSES)
    alike = {name: first if name.endswith("npy") else content for name, content in files.items()}
    write_set(tmp_path / "alike", [alike], CLASSES)
    (tmp_path / "something").mkdir()
    (tmp_path / "something" / "else").touch()
    out = tmp_path / "out"
    cases = [
        (out, ["--eval", tmp_path / "few"], "12 images are too few to halve; give 20"),
        (out, ["--eval", tmp_path / "alike"], "all images have the same labels"),
        (out, ["--eval", tmp_path / "no"], "--eval .*no cannot be used"),
        (out, ["--train-data", labelled / "test" / "0.tar"], "has no image with a caption"),
        (out, ["--train-data", tmp_path / "no.tar"], "--train-data .*No such file.*no.tar"),
        (out, ["--train-data", pairs / "pairs.csv"], "is a table"),
        (out, ["--model", "tiny-vt"], "--model tiny-vt"),
        (tmp_path / "something", [], "something exists and is no comparison"),
        (out, ["--storage", tmp_path], "--storage .* cannot be used"),
        (out, ["--storage", "postgres://nowhere"], "--storage postgres://nowhere cannot be used"),
        (out, ["--hours", "1e-6"], "--hours 1e-06: no method came to its end in that time"),
    ]
    for folder, more, message in cases:
        assert compare(folder, words, *more) == 2
        said = capsys.readouterr().err.splitlines()
        assert re.search(message, said[-1]), (message, said)
    assert compare(out, words, "--train-data", pairs / "00000.tar") == 2
    assert "is a study of other pairs; name another" in capsys.readouterr().err
    monkeypatch.setitem(cli.sys.modules, "optuna", None)
    assert compare(out, words) == 2
    assert "pip install 'otter-openclip[compare]'" in capsys.readouterr().err
