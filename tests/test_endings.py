"""Runs that end before their time, and what ``--resume latest`` makes of what they leave."""

import contextlib
import multiprocessing
import re
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from training_helpers import assert_same, load, train

from otter_openclip.training import plugin, resume

LINE = ["--loss", "otter", "--workers", "0", "--epochs", "3", "--train-num-samples", "24"]
STEPS = 2  # of an epoch
LATEST = ["--resume", "latest"]


@pytest.fixture(scope="module")
def whole(pairs, tmp_path_factory):
    """The checkpoints folder of a run that nobody disturbs."""
    return train(pairs, tmp_path_factory.mktemp("whole"), *LINE)


@contextlib.contextmanager
def at_step(number, act):
    """Call ``act`` after an optimizer's step; gives the list of steps."""
    steps = []

    def count(*_):
        steps.append(len(steps) + 1)
        if len(steps) == number:
            act()

    hook = register_optimizer_step_post_hook(count)
    yield steps
    hook.remove()


def fail():
    raise ValueError("at a step")


def copied(whole, tmp_path, *epochs):
    """A run that came as far as these checkpoints; its checkpoints folder."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder.parent / "out.log").touch()
    for epoch in epochs:
        shutil.copy(whole / f"epoch_{epoch}.pt", folder)
    return folder


def check_end(whole, folder):
    assert_same(load(whole / "epoch_3.pt"), load(folder / "epoch_3.pt"))


@pytest.mark.parametrize("step", [STEPS, STEPS + 1])
def test_sigterm(pairs, tmp_path, whole, caplog, step):
    """An epoch whose last step was done is in a checkpoint."""
    before = signal.getsignal(signal.SIGTERM)
    terminate = partial(signal.raise_signal, signal.SIGTERM)
    with at_step(step, terminate) as steps, pytest.raises(SystemExit) as stop:
        train(pairs, tmp_path, *LINE)
    assert stop.value.code == 143
    assert len(steps) == step  # that one was finished, and no other begun
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["epoch_1.pt"]
    assert f"goes on from {folder / 'epoch_1.pt'}" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before
    train(pairs, tmp_path, *LINE, *LATEST)
    check_end(whole, folder)


def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(pairs, tmp_path, whole):
    """torch itself loads one with flipped bytes."""
    folder = copied(whole, tmp_path, 1, 2)
    bad = folder / "epoch_2.pt"
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content[:-5000], content):
        bad.write_bytes(damaged)
        with pytest.raises(SystemExit) as stop:
            train(pairs, tmp_path, *LINE, *LATEST)
        assert f"{bad} cannot be read as a checkpoint" in stop.value.code
        assert f"beside it {folder / 'epoch_1.pt'} (epoch 1) is whole" in stop.value.code
    torch.load(bad, weights_only=True)
    bad.rename(tmp_path / "damaged")
    train(pairs, tmp_path, *LINE, *LATEST)
    check_end(whole, folder)


@pytest.mark.parametrize("flags", [[], ["--save-most-recent"]])
def test_latest_is_the_newest(pairs, tmp_path, whole, flags):
    """open_clip takes an old epoch_latest.pt, or starts anew because there is none."""
    folder = copied(whole, tmp_path, 1, 2)
    if not flags:
        (folder / "epoch_1.pt").rename(folder / "epoch_latest.pt")
    with at_step(0, None) as steps:
        train(pairs, tmp_path, *LINE, *LATEST, *flags)
    assert len(steps) == STEPS
    check_end(whole, folder)


def test_a_full_disk(pairs, tmp_path, whole):
    """The epoch is lost, and nothing else."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))

    try:
        with at_step(STEPS + 1, fill), pytest.raises(SystemExit) as stop:
            train(pairs, tmp_path, *LINE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    folder = tmp_path / "run" / "checkpoints"
    assert re.search(
        rf"{folder}/epoch_2.pt cannot be written \(.*File too large.*\), so epoch 2 is lost; make "
        rf"room, then .*goes on from {folder}/epoch_1.pt",
        stop.value.code,
    )
    assert [path.name for path in folder.iterdir()] == ["epoch_1.pt"]
    train(pairs, tmp_path, *LINE, *LATEST)
    check_end(whole, folder)


@contextlib.contextmanager
def other_run(folder):
    """A process that holds the lock of a run in ``folder``, and is killed."""
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire()"
    line = [sys.executable, "-c", f"{code}; print('held', flush=True); sys.stdin.read()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([*line, str(folder / ".lock")], **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        yield
        other.kill()


def test_two_runs_of_one_name(pairs, tmp_path, whole, monkeypatch):
    """The second is refused while the first is alive, and only then."""
    monkeypatch.setattr(resume, "_PATIENCE", 0.5)
    folder = copied(whole, tmp_path, 1, 2)
    with other_run(folder.parent):
        said = f"another run writes to {folder.parent}; wait for its end, or pass another"
        with pytest.raises(SystemExit, match=said):
            train(pairs, tmp_path, *LINE, *LATEST)
    train(pairs, tmp_path, *LINE, *LATEST)  # a killed process holds nothing


def test_a_run_that_comes_second_leaves_the_firsts_folder(pairs, tmp_path, monkeypatch):
    """There was none yet when its flags were parsed."""
    folder = tmp_path / "run"
    with contextlib.ExitStack() as stack:

        def begin(args):
            (folder / "checkpoints").mkdir(parents=True)
            stack.enter_context(other_run(folder))
            return resume.Resume(args)

        monkeypatch.setattr(plugin, "Resume", begin)
        monkeypatch.setattr(resume, "_PATIENCE", 0.5)
        with pytest.raises(SystemExit, match="another run writes to"):
            train(pairs, tmp_path, *LINE)
        assert {".lock", "checkpoints"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("loss", "there"), [("otter", False), ("clip", True)])
def test_without_a_step_the_name_is_free(pairs, tmp_path, loss, there):
    line = [*LINE, "--loss", loss, "--epochs", "2", "--precision", "fp32"]
    if there:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "notes").write_text("mine", encoding="utf-8")
    faults = (["--workers", "3"], "number of shards"), (["--resume", "none.pt"], "none.pt")
    for words, said in faults:
        with pytest.raises(SystemExit, match=said):
            train(pairs, tmp_path, *line, *words)
        assert [path.name for path in tmp_path.rglob("*")] == (["run", "notes"] if there else [])
    with at_step(STEPS + 1, fail), pytest.raises(ValueError, match="at a step"):
        train(pairs, tmp_path, *line)
    assert "Start epoch 0" in (tmp_path / "run" / "out.log").read_text(encoding="utf-8")
    # Nor does a later one take anything from the run that it goes on from.
    before = {path.name for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(SystemExit, match="number of shards"):
        train(pairs, tmp_path, *line, *LATEST, "--workers", "3")
    assert {"epoch_1.pt", "out.log"} <= before == {p.name for p in (tmp_path / "run").rglob("*")}


@pytest.mark.parametrize(("loss", "fails"), [("otter", True), ("clip", False)])
def test_no_loader_outlives_a_run(pairs, tmp_path, loss, fails):
    """Not even one that an error's traceback would keep alive."""
    working = []

    def look():
        working.extend(multiprocessing.active_children())
        if fails:
            fail()

    line = ["--loss", loss, "--precision", "fp32", "--epochs", "1", "--batch-size", "4"]
    ends = pytest.raises(ValueError, match="at a step") if fails else contextlib.nullcontext()
    with at_step(1, look), ends as error:
        train(pairs, tmp_path, *line, "--workers", "2")
    assert len(working) == 2 and not set(working) & set(multiprocessing.active_children())
    del error
