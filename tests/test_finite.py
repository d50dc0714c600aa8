"""NaN, infinities and steps that AMP skips: what ends a run, what moves the teacher, what is written."""

import re
from functools import partial

import open_clip
import pytest
import torch
from training_helpers import load, train

from otter_openclip.teacher import EmaTeacher

VIT = "--model tiny-vit --warmup 0"


def stopped(pairs, logs, words):
    with pytest.raises(SystemExit) as stop:
        train(pairs, logs, VIT, words)
    return str(stop.value.code)


@pytest.mark.parametrize(
    ("words", "step", "term"),
    [
        ("otter --log-every-n-steps 4", 4, "contrastive_loss is nan, distill_loss"),
        ("kd --log-every-n-steps 100", 5, "contrastive_loss is nan, distill_loss"),
        ("infonce", 2, "contrastive_loss is nan"),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run_where_it_would_be_logged(
    pairs, tmp_path, monkeypatch, words, step, term
):
    """Or after the epoch; it is so from the epoch's step 2 on."""
    calls, stock = [], open_clip.CLIP.forward

    def forward(*args, **kwargs):
        output = dict(stock(*args, **kwargs))
        if torch.is_grad_enabled():
            calls.append(output)
            rows = torch.arange(12)[:, None] == 3
            if len(calls) == 6 + 3:
                output["image_features"] = output["image_features"].masked_fill(rows, torch.nan)
        return output

    monkeypatch.setattr(open_clip.CLIP, "forward", forward)
    said = stopped(pairs, tmp_path, f"--loss {words}")
    assert f"error: the loss of step {step} of epoch 1 (both counted from 0): {term}" in said
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["epoch_1.pt"]
    assert all(x.isfinite().all() for x in load(checkpoints / "epoch_1.pt")["state_dict"].values())


def test_what_no_loss_shows_does_not_reach_a_checkpoint_or_results(pairs, tmp_path, monkeypatch):
    """A gradient of the last step alone; and statistics of batch-norm."""
    words = f"--loss otter --epochs 1 --val-data {pairs}/00000.tar --val-num-samples 36"
    stock, steps = torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        steps.append(self)
        if len(steps) == 6:
            next(p for p in self.param_groups[0]["params"] if p.ndim).grad[0] = float("nan")
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    said = stopped(pairs, tmp_path, words)
    assert re.search("error: .* of the student is not finite after the epoch; nothing was", said)
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("results.jsonl"))
    monkeypatch.undo()

    stock_update = EmaTeacher.update

    def update(self, *args, **kwargs):
        stock_update(self, *args, **kwargs)
        self.module.visual.bn1.running_var[0] = float("inf")

    monkeypatch.setattr(EmaTeacher, "update", update)
    said = stopped(pairs, tmp_path, f"{words} --model tiny-rn --name rn")
    assert "visual.bn1.running_var of the teacher is not finite" in said
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_amp_skips_does_not_move_the_teacher(pairs, tmp_path, monkeypatch, fused):
    """A fused optimizer is called for such a step too; it has skipped the students' part itself."""
    stock, update = torch.amp.GradScaler.step, EmaTeacher.update
    fine, moved = [], []

    def step(self, optimizer, *args, **kwargs):
        if len(fine) in (4, 7):
            optimizer.param_groups[0]["params"][-1].grad.fill_(float("inf"))
        fine.append(None)
        stock(self, optimizer, *args, **kwargs)
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
        fine[-1] = not sum(value.item() for value in found)

    def counted(self, *args, **kwargs):
        moved.append(len(fine) - 1)
        update(self, *args, **kwargs)

    monkeypatch.setattr(torch.amp.GradScaler, "step", step)
    monkeypatch.setattr(EmaTeacher, "update", counted)
    if fused:
        monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, fused=True))
    checkpoint = load(train(pairs, tmp_path, VIT, "--loss otter --precision amp") / "epoch_2.pt")
    assert len(fine) == 12 and not fine[4] and not fine[7] and sum(fine) > 6
    assert moved == [number for number, good in enumerate(fine) if good]
    assert checkpoint["otter"]["teacher_state"]["num_updates"] == len(moved) + 1
    for part in ("state_dict", "state_dict_ema"):
        assert all(value.isfinite().all() for value in checkpoint[part].values())
