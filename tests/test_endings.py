"""Runs that end before their time, and what ``--resume latest`` makes of what they leave."""

import contextlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import filelock
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from training_helpers import assert_same, load, train

from otter_openclip.training.plugin import TrainingPlugin

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


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


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


def test_sigterm_between_two_steps(pairs, tmp_path, whole, caplog):
    before = signal.getsignal(signal.SIGTERM)
    with at_step(STEPS + 1, terminate) as steps, pytest.raises(SystemExit) as stop:
        train(pairs, tmp_path, *LINE)
    assert stop.value.code == 143
    assert len(steps) == STEPS + 1  # that one was finished, and no other begun
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["epoch_1.pt"]
    assert "what epoch 1 had done is lost" in caplog.text
    assert f"--resume latest goes on from {folder / 'epoch_1.pt'}" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before
    train(pairs, tmp_path, *LINE, *LATEST)
    check_end(whole, folder)


@pytest.mark.parametrize("frequency", ["0", "1"])
def test_sigterm_in_the_last_step_of_an_epoch(pairs, tmp_path, whole, caplog, frequency):
    """The epoch is whole, and in a checkpoint even if the run would not have made one."""
    line = [*LINE, "--save-frequency", frequency]
    with at_step(STEPS, terminate), pytest.raises(SystemExit) as stop:
        train(pairs, tmp_path, *line)
    assert stop.value.code == 143
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["epoch_1.pt"]
    assert f"1 epochs are whole; the same command with --resume latest goes on from {folder}" in (
        caplog.text
    )
    train(pairs, tmp_path, *line, *LATEST)
    check_end(whole, folder)


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(pairs, tmp_path, whole, damage):
    """torch itself loads one with flipped bytes."""
    folder = copied(whole, tmp_path, 1, 2)
    bad = folder / "epoch_2.pt"
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content if damage == "flip" else content[:-5000])
    if damage == "flip":
        torch.load(bad, weights_only=True)
    with pytest.raises(SystemExit) as stop:
        train(pairs, tmp_path, *LINE, *LATEST)
    assert f"{bad} cannot be read as a checkpoint" in stop.value.code
    offer = f"the one before it, {folder / 'epoch_1.pt'} (epoch 1), is whole: move the damaged file"
    assert offer in stop.value.code
    if damage == "flip":
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


def test_two_runs_of_one_name(pairs, tmp_path, whole):
    """The second is refused while the first is alive, and only then."""
    folder = copied(whole, tmp_path, 1, 2)
    code = "import sys, filelock; c = filelock.FileLock(sys.argv[1]); c.acquire(); print('held')"
    line = [sys.executable, "-c", f"{code}; sys.stdout.flush(); sys.stdin.read()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    lock = folder.parent / ".lock"
    with subprocess.Popen([*line, str(lock)], **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(SystemExit) as stop:
            train(pairs, tmp_path, *LINE, *LATEST)
        assert (
            f"another run writes to {folder.parent}; wait for its end, or pass another --name"
            in (stop.value.code)
        )
        other.kill()
    filelock.FileLock(lock).acquire(timeout=5).lock.release()  # a killed process holds nothing


@pytest.mark.parametrize("loss", ["otter", "clip"])
@pytest.mark.parametrize("csv", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_no_loader_outlives_a_run(pairs, tmp_path, monkeypatch, loss, csv, fails):
    """Not even one that an error's traceback, or the plugin, would keep alive."""
    plugins, working = [], []
    init = TrainingPlugin.__init__
    monkeypatch.setattr(
        TrainingPlugin, "__init__", lambda self, prog: (plugins.append(self), init(self, prog))[1]
    )

    def look():
        working.extend(multiprocessing.active_children())
        if fails:
            raise ValueError("at a step")

    line = ["--loss", loss, "--precision", "fp32", "--epochs", "1", "--batch-size", "4"]
    ends = pytest.raises(ValueError, match="at a step") if fails else contextlib.nullcontext()
    with at_step(1, look), ends as error:
        train(pairs, tmp_path, *line, "--workers", "2", csv=csv)
    assert len(working) == 2 and not set(working) & set(multiprocessing.active_children())
    assert plugins[0]._train is None
    del error
