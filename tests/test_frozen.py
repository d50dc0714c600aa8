"""``--lock-image`` and ``--lock-text``: what is frozen stays what it was, runs once, and exports."""

import copy
import json
from argparse import Namespace

import open_clip
import pytest
import torch
from conftest import MODELS
from timm.layers import BatchNormAct2d
from training_helpers import load, train, trained_once

from otter_openclip.frozen.prefix import find_prefixes, install
from otter_openclip.training.student_with_teacher import MovingAverage, StudentWithTeacher, Teacher

FREEZE = "--lock-image --lock-image-freeze-bn-stats"


@pytest.fixture(scope="module", autouse=True)
def efficientnet(tmp_path_factory):
    """A timm tower whose batch norms hold the activations."""
    folder = tmp_path_factory.mktemp("efficientnet")
    vision = MODELS["tiny-timm"]["vision_cfg"] | {"timm_model_name": "test_efficientnet"}
    config = MODELS["tiny-timm"] | {"vision_cfg": vision | {"timm_drop": 0.0}}
    (folder / "tiny-effnet.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder / "tiny-effnet.json")


@pytest.mark.parametrize(
    ("model", "words"),
    [("tiny-rn", "--loss infonce"), ("tiny-effnet", "--loss otter --accum-freq 2 --batch-size 6")],
)
def test_a_frozen_tower_is_the_pretrained_one(pairs, tmp_path, model, words):
    before = trained_once(model, tmp_path / "start.pt")
    start = f"--model {model} --pretrained {tmp_path}/start.pt --epochs 1"
    path = train(pairs, tmp_path, words, start, FREEZE)
    state = load(path / "epoch_1.pt")["state_dict"]
    assert state.keys() == before.keys()
    assert any("num_batches_tracked" in key for key in state)
    prefix = "visual.trunk." if model == "tiny-effnet" else "visual."
    changed = [key for key in state if not torch.equal(state[key], before[key])]
    assert changed and not any(key.startswith(prefix) for key in changed)


@pytest.mark.parametrize("words", [f"--loss otter {FREEZE}", "--loss infonce --lock-image"])
def test_a_frozen_tower_runs_once_and_in_eval_mode(pairs, tmp_path, monkeypatch, words):
    """For student and teacher, also after open_clip's loop has called ``train()``."""
    seen, stock = [], BatchNormAct2d.forward

    def record(self, x):
        seen.append(self.training)
        return stock(self, x)

    monkeypatch.setattr(BatchNormAct2d, "forward", record)
    train(pairs, tmp_path, words, "--model tiny-effnet --epochs 1")
    model = open_clip.create_model("tiny-effnet")
    norms = sum(type(module) is BatchNormAct2d for module in model.modules())
    assert len(seen) == 6 * norms and not any(seen)


LOCKS = {
    "trunk": ["visual.trunk"],
    "transformer": ["text.transformer"],
    "both": ["visual.trunk", "text.transformer"],
    "whole": ["visual", "text"],
    "some layers": ["visual.trunk.conv1", "text.transformer.embeddings"],
}


@pytest.mark.parametrize("case", LOCKS)
def test_student_and_teacher_are_what_they_would_be_alone(hf_model, case):
    """Features, gradients, and a teacher that holds no copy of what is frozen."""
    expected = {} if case == "some layers" else {n.split(".")[0]: n for n in LOCKS[case]}
    model = open_clip.create_model(hf_model, output_dict=True)
    for name in LOCKS[case]:
        model.get_submodule(name).requires_grad_(False)
    alone = copy.deepcopy(model).train()
    for name in expected.values():
        alone.get_submodule(name).eval()
    assert find_prefixes(model) == expected
    install(model, expected)
    average = MovingAverage(Namespace(ema_decay=0.999), model, expected, eval_mode=False)
    teacher = average.ema
    for name in expected.values():
        assert teacher.module.get_submodule(name) is model.get_submodule(name)
    own = {id(p) for p in teacher.module.parameters()} - {id(p) for p in model.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(own) == len(trained if expected else list(model.parameters()))

    frozen = list(expected.values())
    both = StudentWithTeacher(model, average, frozen=frozen, prefixes=expected).train()
    images, texts = torch.randn(6, 3, 32, 32), torch.randint(1, 14, (6, 8))
    outputs = []
    for call in (both, alone):
        torch.manual_seed(5)  # of the dropout that is left
        outputs.append(output := call(images, texts))
        logits = output["image_features"] @ output["text_features"].T
        (output["logit_scale"] * logits).exp().sum().backward()
    for key in ("image_features", "text_features"):
        torch.testing.assert_close(*(output[key] for output in outputs))
        assert not outputs[0][f"dist_{key}"].requires_grad
    pairs = zip(model.named_parameters(), alone.parameters(), strict=True)
    for (name, one), other in pairs:
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            # Without gradients oneDNN takes other kernels, on some processors.
            size = float(other.grad.abs().max())
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5 * (1 + size))
    teacher.update(model)
    assert teacher.module.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("whole", [False, True])
def test_dropout_on_frozen_features_is_the_students_alone(hf_model, whole):
    """In training; a teacher, the student itself too, sees all that frozen towers give."""
    model = open_clip.create_model(hf_model, output_dict=True)
    for name in LOCKS["both"]:
        model.get_submodule(name).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # of the model's own
    prefixes = find_prefixes(model)
    install(model, prefixes)
    teacher = Teacher(model)
    if whole:
        teacher = MovingAverage(Namespace(ema_decay=0.999), model, prefixes, eval_mode=False)
    common = {"prefixes": prefixes, "frozen": list(prefixes.values())}
    plain = StudentWithTeacher(model, teacher, **common).train()
    dropped = StudentWithTeacher(model, teacher, feature_dropout=0.5, **common).train()
    images, texts = torch.randn(6, 3, 32, 32), torch.randint(1, 14, (6, 8))
    for name in ("image_features", "text_features"):
        expected = plain(images, texts)[f"dist_{name}"]
        output = dropped(images, texts)
        assert not torch.allclose(output[name], expected, atol=1e-3)
        torch.testing.assert_close(output[f"dist_{name}"], expected)
    inputs = [torch.ones(200, 16), torch.ones(200, 16)]
    for features in dropped._dropped(inputs):
        assert set(features.unique().tolist()) == {0.0, 2.0}  # none, or twice as much
        assert (features == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert all(map(torch.equal, dropped.eval()._dropped(inputs), inputs))


def test_the_student_as_its_own_teacher_makes_no_second_forward(pairs, tmp_path, monkeypatch):
    """`--ema-decay 0`: no copy, no teacher in checkpoints, and the loss of the student's features."""
    seen, stock = [], open_clip.CLIP.forward
    monkeypatch.setattr(open_clip.CLIP, "forward", lambda *a, **k: seen.append(1) or stock(*a, **k))
    for words, count in {
        "0.9": 2 * 6,  # of student and teacher, in each of six steps
        "0.9 --accum-freq 2 --batch-size 6": 6 * 2 * (2 + 1),
        "0": 6,
    }.items():
        seen.clear()
        path = train(pairs, tmp_path / f"{count}", f"--loss otter --epochs 1 --ema-decay {words}")
        assert len(seen) == count
        assert ("state_dict_ema" in load(path / "epoch_1.pt")) == (words != "0")
