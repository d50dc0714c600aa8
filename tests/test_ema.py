"""``--loss clip --ema-decay``, and ``--zeroshot-weights``."""

from __future__ import annotations

import pytest
import torch
from test_zeroshot_training import plain_flat_hit, results
from training_helpers import assert_same, load, train

COMMON = "--lr 0.02 --precision fp32 --train-num-samples 24"


def test_clip_keeps_evaluates_and_resumes_an_ema(pairs, labelled, tmp_path):
    words = f"--ema-decay 0.7 --zeroshot-frequency 1 {COMMON}"
    zeroshot = f"--zeroshot-data {labelled} --zeroshot-weights teacher"
    folder = train(pairs, tmp_path / "ema", words, zeroshot)
    last = load(folder / "epoch_2.pt")
    assert last["otter"]["settings"] == {"loss": "clip", "ema_decay": 0.7}
    # The same data as with the other losses, and the student is what it is without the EMA.
    without = load(train(pairs, tmp_path / "without", "--loss infonce", COMMON) / "epoch_2.pt")
    assert_same(last["state_dict"], without["state_dict"])
    # Parameters lag behind, buffers are the student's.
    own, ema = last["state_dict"], last["state_dict_ema"]
    assert not torch.equal(own["text_projection"], ema["text_projection"])
    assert torch.equal(own["visual.bn1.running_mean"], ema["visual.bn1.running_mean"])
    for epoch, line in enumerate(results(folder), 1):
        torch.save(load(folder / f"epoch_{epoch}.pt")["state_dict_ema"], tmp_path / "teacher.pt")
        score = plain_flat_hit(tmp_path / "teacher.pt", labelled)
        assert line["zeroshot-flat_hit@1"] == pytest.approx(score)
    assert "state_dict_ema" in load(folder / "best.pt")
    resume = f"--resume {folder / 'epoch_1.pt'}"
    assert_same(load(train(pairs, tmp_path / "again", words, resume) / "epoch_2.pt"), last)


def test_the_teacher_of_locked_towers_is_evaluated_whole(pairs, labelled, tmp_path):
    words = f"--loss otter --model tiny-timm --lock-image --feature-cache {tmp_path}/features"
    zeroshot = f"--epochs 1 --zeroshot-data {labelled} --zeroshot-weights teacher"
    folder = train(pairs, tmp_path, words, zeroshot, COMMON)
    torch.save(load(folder / "epoch_1.pt")["state_dict_ema"], tmp_path / "t.pt")
    (line,) = results(folder)
    score = plain_flat_hit(tmp_path / "t.pt", labelled, "tiny-timm")
    assert line["zeroshot-flat_hit@1"] == pytest.approx(score)


def test_another_runs_checkpoint_starts_the_ema_anew(pairs, tmp_path, caplog):
    first = train(pairs, tmp_path / "one", "--epochs 1", COMMON) / "epoch_1.pt"
    words = f"--resume {first} --ema-decay 0.5 {COMMON}"
    last = load(train(pairs, tmp_path / "two", words) / "epoch_2.pt")
    assert "was not written with this plugin's losses" in caplog.text
    assert last["otter"]["teacher_state"]["num_updates"] == 3  # two steps
    state = load(first)["state_dict"]
    average = last["state_dict_ema"]["text_projection"] - state["text_projection"]
    step = last["state_dict"]["text_projection"] - state["text_projection"]
    assert 0 < average.norm() < step.norm()  # it started where the student did


@pytest.mark.parametrize("loss", ["clip", "otter --ema-decay 0"])
def test_an_ema_that_is_not_kept_on_is_said(pairs, tmp_path, caplog, loss):
    words = "--loss otter --ema-decay 0.7 --epochs 1"
    first = train(pairs, tmp_path / "one", words, COMMON) / "epoch_1.pt"
    words = f"--resume {first} --loss {loss}"
    last = load(train(pairs, tmp_path / "two", words, COMMON) / "epoch_2.pt")
    assert "state_dict_ema" not in last
    assert "Resuming with other settings than before: " in caplog.text
    assert "EMA ends here, this run's checkpoints have none; to keep it go on with" in caplog.text
