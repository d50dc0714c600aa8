"""The EMA teacher, alone and in the reference's recorded trajectories."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_cases import DEVICES
from torch import nn

from otter_openclip import DistillationLoss, EmaTeacher, OtterLoss

GOLDEN = np.load(Path(__file__).parent / "golden" / "trajectories.npz")


class TwoTowers(nn.Module):
    def __init__(self, golden):
        super().__init__()
        self.image = nn.Linear(12, 8)
        self.text = nn.Linear(12, 8)
        scale = golden["init/contrastive_loss.loss.T"]
        self.logit_scale = nn.Parameter(torch.tensor(float(scale)))
        with torch.no_grad():
            for tower in ("image", "text"):
                for name, param in getattr(self, tower).named_parameters():
                    param.copy_(torch.tensor(golden[f"init/{tower}_encoder.l.{name}"]))

    def forward(self, images, texts):
        return F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)


@pytest.mark.parametrize(
    ("case", "make_loss", "decay", "lr"),
    [
        ("otter", OtterLoss, 0.999, 0.05),
        ("kd", partial(DistillationLoss, vv_coef=1.0, tt_coef=1.0), 0.999, 0.05),
        ("otter_decay0.9", OtterLoss, 0.9, 0.1),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_reference_trajectory(case, make_loss, decay, lr, device):
    check_trajectory(case, make_loss, decay, lr, device)


def check_trajectory(
    case, make_loss, decay, lr, device, dtype=torch.float64, autocast=nullcontext, rel=1e-6
):
    """Train as recorded: terms and scales to ``rel``, weights by entry, as wholes if it is big."""
    golden = {key.partition("/")[2]: GOLDEN[key] for key in GOLDEN if key.startswith(f"{case}/")}
    student = TwoTowers(golden).to(device, dtype)
    loss = make_loss().to(device, dtype)
    teacher = EmaTeacher(student, decay)
    parameters = [*student.parameters(), *loss.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    batches = zip(*(torch.tensor(golden[side]) for side in ("images", "texts")), strict=True)
    for step, (images, texts) in enumerate(batches):
        images, texts = (x.to(device, dtype) for x in (images, texts))
        if step:
            teacher.update(student)
        with autocast():
            with torch.no_grad():
                targets = teacher.module(images, texts)
            scale = student.logit_scale.exp().clamp(1, 100)  # as the reference
            terms = loss(*student(images, texts), scale, *targets, output_dict=True)
        for name, key in (("contrastive_loss", "contrastive"), ("distill_loss", "distillation")):
            # Summed directions before alpha = 1/2 there: a factor of 4.
            assert 4 * terms[name].item() == pytest.approx(golden[key][step], rel=rel)
        optimizer.zero_grad()
        (2 * sum(terms.values())).backward()
        optimizer.step()
    for model, name in ((student, "student"), (teacher.module, "teacher")):
        for tower in ("image", "text"):
            for key, param in getattr(model, tower).named_parameters():
                expected = torch.tensor(golden[f"{name}/{tower}_encoder.l.{key}"])
                found = param.detach().double().cpu()
                if rel < 1e-3:
                    torch.testing.assert_close(found, expected.double(), rtol=rel, atol=rel / 10)
                else:  # its training amplifies rounding
                    assert (found - expected).norm() < 5 * rel * expected.norm()
    assert student.logit_scale.item() == pytest.approx(float(golden["final_T"]), rel=rel)
    assert loss.distill_logit_scale.item() == pytest.approx(float(golden["final_T_s"]), rel=rel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_survive_half_precision(dtype):
    model = nn.Linear(4, 4, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    teacher = EmaTeacher(model, 0.999)
    teacher.num_updates = 10**6
    nn.init.constant_(model.weight, 1.5)
    for _ in range(300):
        teacher.update(model)
    # 1.5 - 0.5 * 0.999^300; each single step is far below half precision's spacing.
    assert teacher.module.weight.dtype == dtype
    assert teacher.module.weight.float().mean().item() == pytest.approx(1.1296, abs=0.005)


def test_buffers_are_the_teachers_own_in_train_mode_and_the_students_in_eval_mode():
    for eval_mode in (False, True):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        teacher = EmaTeacher(model, eval_mode=eval_mode)
        model(torch.randn(5, 3) + 4)
        teacher.update(model)
        same = torch.equal(teacher.module[1].running_mean, model[1].running_mean)
        assert same == eval_mode and teacher.module.training != eval_mode


def test_another_model_is_refused():
    teacher = EmaTeacher(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="1 parameters differ, first 'weight'"):
        teacher.update(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="decay must lie in"):
        EmaTeacher(nn.Linear(1, 1), 1.5)


@pytest.mark.parametrize("decay", [0.999, 0.3, 0.0])
def test_decay_is_the_papers(decay):
    model = nn.Linear(1, 1, bias=False)
    for n in (*range(2, 40), 9_000, 10**6):
        nn.init.zeros_(model.weight)
        teacher = EmaTeacher(model, decay)
        nn.init.ones_(model.weight)
        teacher.update(model, step=n - 1)
        expected = 1 - min(decay, (1 + n) / (10 + n))
        assert teacher.module.weight.item() == pytest.approx(expected, rel=1e-5)
        assert teacher.num_updates == n
        assert model.weight.item() == 1.0 and not teacher.module.weight.requires_grad
