"""A training step's cost where it can be checked without a clock."""

from argparse import Namespace

import open_clip
import pytest
import torch
from loss_cases import SETTINGS

from otter_openclip.training.student_with_teacher import MovingAverage, StudentWithTeacher


def beside_its_teacher(student):
    """The module that is trained, and the moving average in it."""
    teacher = MovingAverage(Namespace(ema_decay=0.999), student, {}, eval_mode=False)
    return StudentWithTeacher(student, teacher).train(), teacher.ema


@pytest.mark.parametrize("name", ["ls", "kd", "otter", "otter-sharp"])
@pytest.mark.parametrize("impl", ["auto", "streaming", "plain"])
@pytest.mark.parametrize("model", ["tiny-vit", "tiny-rn"])
def test_a_step_reads_nothing_back_from_the_device(model, impl, name, monkeypatch):
    """On tensors without data any read-back (``item``, ``bool``, ``nonzero``, ...) is an error."""
    stock = torch.Generator  # timm's EMA makes one, which tensors without data have not
    monkeypatch.setattr(torch, "Generator", lambda device=None: stock())
    student = open_clip.create_model(model, output_dict=True).to("meta")
    loss = SETTINGS[name](impl=impl).to("meta")
    both, teacher = beside_its_teacher(student)
    parameters = [*student.parameters(), *loss.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    optimizer.register_step_post_hook(lambda *_: teacher.update(student))
    images = torch.empty(6, 3, 32, 32, device="meta")
    texts = torch.empty(6, 8, dtype=torch.long, device="meta")
    for _ in range(2):
        terms = loss(**both(images, texts), output_dict=True)
        sum(terms.values()).backward()
        optimizer.step()
    assert all(p.grad is not None for p in parameters)
    with pytest.raises(RuntimeError):
        sum(terms.values()).item()


def test_the_teacher_keeps_no_autograd_state_and_one_fused_update(monkeypatch):
    student = open_clip.create_model("tiny-vit", output_dict=True)
    both, teacher = beside_its_teacher(student)
    output = both(torch.randn(2, 3, 32, 32), torch.randint(0, 9, (2, 8)))
    assert output["image_features"].grad_fn is not None
    for key in ("dist_image_features", "dist_text_features"):
        assert output[key].grad_fn is None and not output[key].requires_grad
    sum(v.sum() for v in output.values() if v.requires_grad).backward()
    assert all(p.grad is None for p in teacher.module.parameters())
    calls, stock = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *a: calls.append(len(a[0])) or stock(*a))
    teacher.update(student)
    assert calls == [len(list(student.parameters()))]
