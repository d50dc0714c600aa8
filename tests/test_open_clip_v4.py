"""The adapter for open_clip 4.x: its task alone, and the training command. Needs a checkout of 4.x."""

import copy
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from test_distributed import torchrun
from test_teacher import TwoTowers, golden_case
from test_zeroshot_training import plain_flat_hit
from torch import nn
from training_helpers import assert_same, flags, load, parse_args, tear, train

from otter_openclip import DistillationLoss, LabelSmoothingLoss, OtterLoss
from otter_openclip.checkpoints.export import export_checkpoint
from otter_openclip.train import main

V4 = importlib.util.find_spec("open_clip.task") is not None
pytestmark = pytest.mark.skipif(not V4, reason="open_clip 4.x (open_clip.task) is not importable")
if V4:
    from open_clip.task import CLIPTask
    from open_clip_train import main as open_clip_main

    from otter_openclip.training import open_clip_v4
    from otter_openclip.training.open_clip_v4 import OtterTask

HERE = Path(__file__).parent
LOSSES = {
    "infonce": open_clip.ClipLoss,
    "ls": lambda: LabelSmoothingLoss(0.1),
    "kd": lambda: DistillationLoss(0.3),
    "otter": OtterLoss,
}
TEACHER = ("kd", "otter")
SGD = ["--opt", "timm/momentum", "--momentum", "0.9", "--wd", "0", "--lr", "0.1"]


def make_model(name="tiny-vit", seed=0):
    torch.manual_seed(seed)
    return open_clip.create_model(name, output_dict=True)


def make_task(loss, model=None, **kwargs):
    task = OtterTask(model or make_model(), loss=LOSSES[loss](), **kwargs)
    return task.setup_ema() if loss in TEACHER and task.teacher is None else task


def make_batch(count=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, 32, 32, generator=generator)
    return {"image": image, "text": torch.randint(1, 400, (count, 8), generator=generator)}


def gradients(task):
    found = dict(task.trainable_module.named_parameters())
    found |= {f"loss.{name}": param for name, param in task.loss.named_parameters()}
    return {name: param.grad.clone() for name, param in found.items() if param.grad is not None}


def shifted(model, by=0.05):
    """A copy with other weights: a teacher that is not the student."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for param in other.parameters():
            param += by * torch.randn(param.shape, generator=generator)
    return other


def assert_close(one, other, rtol=1e-5, atol=1e-7):
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=rtol, atol=atol, msg=key)


@pytest.mark.parametrize(
    ("name", "fixed"), [*((name, False) for name in LOSSES), ("kd", True), ("otter", True)]
)
def test_a_step_is_the_loss_on_the_features(name, fixed):
    student, batch = make_model(), make_batch()
    teacher = shifted(student)
    task = make_task(name, copy.deepcopy(student), **({"teacher": teacher} if fixed else {}))
    if task.has_ema:
        task.trainable_module_ema.module.load_state_dict(teacher.state_dict())
    losses, report = task(batch)
    losses["loss"].backward()

    with torch.no_grad():
        output = teacher(**batch)
    given = {f"dist_{key}": output[key] for key in ("image_features", "text_features")}
    loss = LOSSES[name]()
    expected = loss(**student(**batch), **(given if name in TEACHER else {}), output_dict=True)
    sum(expected.values()).backward()
    terms = {key: value for key, value in losses.items() if key.endswith("_loss")}
    assert_close(expected, terms)
    torch.testing.assert_close(losses["loss"], sum(expected.values()))
    by_hand = {key: param.grad for key, param in student.named_parameters()}
    by_hand |= {f"loss.{key}": param.grad for key, param in loss.named_parameters()}
    assert_close(by_hand, gradients(task), atol=1e-6)
    assert ("loss.distill_logit_scale" in by_hand) == (name in TEACHER)
    assert report["logit_scale"] == student.logit_scale.exp()
    logged = losses.keys() - terms.keys() - {"loss"}
    statistics = {"distill_scale", "target_entropy", "target_top_share"}
    assert logged == {
        "otter": statistics | {"marginal_error"},
        "kd": statistics,
    }.get(name, set())
    if name in TEACHER:
        model = task.teacher if fixed else task.trainable_module_ema.module
        assert all(param.grad is None for param in model.parameters())


class Towers(TwoTowers):
    """The reference's two towers, called as open_clip 4.x's tasks call a model."""

    def forward(self, image, text):
        image, text = super().forward(image, text)
        scale = self.logit_scale.exp().clamp(1, 100)  # as the reference
        return {"image_features": image, "text_features": text, "logit_scale": scale}


@pytest.mark.parametrize(
    ("case", "make_loss", "decay", "lr"),
    [
        ("otter", OtterLoss, 0.999, 0.05),
        ("kd", partial(DistillationLoss, vv_coef=1.0, tt_coef=1.0), 0.999, 0.05),
        ("otter_decay0.9", OtterLoss, 0.9, 0.1),
    ],
)
def test_reference_trajectory(case, make_loss, decay, lr):
    golden, part = golden_case(case)
    student = Towers(part("init")).double()
    task = OtterTask(student, loss=make_loss().double()).setup_ema(decay)
    optimizer = torch.optim.SGD([*student.parameters(), *task.loss.parameters()], lr, momentum=0.9)
    images, texts = (torch.tensor(golden[key]).double() for key in ("images", "texts"))
    for step in range(len(images)):
        if step:
            task.update_ema()
        losses, _ = task({"image": images[step], "text": texts[step]})
        for name, key in (("contrastive_loss", "contrastive"), ("distill_loss", "distillation")):
            # Summed directions before alpha = 1/2 there: a factor of 4.
            assert 4 * losses[name].item() == pytest.approx(golden[key][step], rel=1e-6)
        optimizer.zero_grad()
        (2 * losses["loss"]).backward()
        optimizer.step()
    assert len(images) == 25
    models = (("student", student), ("teacher", task.trainable_module_ema.module))
    for name, model in models:
        for tower in ("image", "text"):
            for key, param in getattr(model, tower).named_parameters():
                expected = torch.tensor(part(name)[f"{tower}_encoder.l.{key}"]).double()
                torch.testing.assert_close(param.detach(), expected, rtol=1e-6, atol=1e-7)
    assert student.logit_scale.item() == pytest.approx(float(golden["final_T"]), rel=1e-6)
    scale = task.loss.distill_logit_scale
    assert scale.item() == pytest.approx(float(golden["final_T_s"]), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_accumulated_gradients_are_the_whole_batchs(name):
    """Called as open_clip's loop calls it; the teacher once for each micro-batch."""
    whole, model = make_batch(), make_model()
    parts = [{key: value[i : i + 4] for key, value in whole.items()} for i in (0, 4, 8)]
    one, three = (make_task(name, copy.deepcopy(model)) for _ in range(2))
    for task in (one, three):
        if task.has_ema:
            task.trainable_module_ema.module.load_state_dict(shifted(model).state_dict())
    calls = []
    if three.has_ema:
        three.trainable_module_ema.module.register_forward_hook(lambda *_: calls.append(1))
    losses, _ = one(whole)
    losses["loss"].backward()
    # The first is given up after one micro-batch; each gets its own teacher features.
    for batches, used in ((parts[::-1], 1), (parts, 3), (parts, 3)):
        three.zero_grad()
        with torch.no_grad():
            cached = [dict(three.trainable_module(**batch)) for batch in batches]
        for j, batch in enumerate(batches[:used]):
            output = dict(three.trainable_module(**batch))
            scale = {"logit_scale": output.pop("logit_scale")}
            rows = [*cached[:j], output, *cached[j + 1 :]]
            inputs = {key: torch.cat([row[key] for row in rows]) for key in output}
            found, report = three.compute_accum_loss(inputs, scale, batches)
            assert report["logit_scale"] == model.logit_scale.exp()
            terms = {key: value for key, value in found.items() if key.endswith("_loss")}
            sum(terms.values()).backward()
            if batches is parts:
                torch.testing.assert_close(sum(terms.values()), losses["loss"])
    assert len(calls) == (9 if name in TEACHER else 0)
    found = gradients(three)
    if name in TEACHER:
        # s_d's is the optimizer's concern, see setup_optimizer.
        found["loss.distill_logit_scale"] /= len(parts)
    assert_close(gradients(one), found, rtol=1e-4, atol=1e-6)


def test_the_student_is_evaluated_and_exported():
    task, batch = make_task("otter"), make_batch(4)
    with torch.no_grad():
        for param in task.trainable_module_ema.module.parameters():
            param.zero_()
    student = task.get_trainable_module()
    assert student is task.trainable_module
    assert task.get_trainable_module(use_ema=True) is task.trainable_module_ema.module
    task.eval()
    with torch.no_grad():
        expected = student(**batch)
        assert_same(dict(expected), dict(task(batch)))
        assert_same(dict(expected)["image_features"], task(image=batch["image"])["image_features"])
    assert_same(dict(task.state_dict_for_inference()), dict(student.state_dict()))
    assert task.state_dict().keys() == {"state_dict", "state_dict_ema"}


def test_modes():
    task = make_task("otter", make_model("tiny-rn"))
    ema = task.trainable_module_ema
    assert ema.module.training
    assert not task.eval().trainable_module_ema.module.training
    task.train()
    assert ema.module.training and task.trainable_module.training
    task.setup_ema(eval_mode=True)
    assert not task.trainable_module_ema.module.training and task.trainable_module.training
    fixed = OtterTask(make_model(), loss=OtterLoss(), teacher=make_model(seed=1)).train()
    assert not fixed.teacher.training and not fixed.has_ema


def test_wrong_use_is_named():
    model, batch = make_model(), make_batch(2)
    with pytest.raises(RuntimeError, match=r"OtterLoss needs a teacher: call task.setup_ema\(\)"):
        OtterTask(model, loss=OtterLoss())(batch)
    with pytest.raises(ValueError, match="LabelSmoothingLoss has no teacher"):
        OtterTask(model, loss=LabelSmoothingLoss(0.1)).setup_ema()
    with pytest.raises(ValueError, match="ClipLoss has no teacher"):
        OtterTask(model, loss=open_clip.ClipLoss(), teacher=model)
    with pytest.raises(ValueError, match="has a fixed teacher"):
        OtterTask(model, loss=OtterLoss(), teacher=make_model()).setup_ema()
    with pytest.raises(ValueError, match="decay must lie in"):
        OtterTask(model, loss=OtterLoss()).setup_ema(1.5)
    with pytest.raises(ValueError, match="student's device, cpu, not meta"):
        OtterTask(model, loss=OtterLoss()).setup_ema(device=torch.device("meta"))


def test_weights_without_an_ema_start_the_teacher_anew():
    task = make_task("otter")
    task.update_ema()
    weights = make_model(seed=3).state_dict()
    task.load_state_dict({"state_dict": weights})
    assert_same(dict(weights), dict(task.trainable_module_ema.module.state_dict()))
    assert task.trainable_module_ema.num_updates == 1


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(["--loss", "otter", "--workers", "2", "--grad-clip-norm", "1"], id="otter"),
        pytest.param(["--loss", "kd", "--csv", "--teacher-mode", "eval"], id="kd-csv"),
        pytest.param(["--loss", "ls", "--csv", "--workers", "0"], id="ls-csv"),
        pytest.param(["--loss", "infonce"], id="infonce"),
        pytest.param(["--loss", "otter", "--model", "tiny-timm"], id="timm-dropout"),
        pytest.param(["--loss", "otter", *SGD], id="sgd"),
        pytest.param(["--ema-decay", "0.7"], id="clip-ema"),
        pytest.param(["--loss", "otter", "--accum-freq", "2", "--batch-size", "6"], id="accum"),
        pytest.param(["--loss", "otter", "--precision", "pure_bf16"], id="pure-bf16"),
        pytest.param(
            ["--loss", "otter", "--dataset-resampled", "--train-num-samples", "60"], id="resampled"
        ),
    ],
)
def test_resume_is_exact(pairs, tmp_path, extra):
    csv = "--csv" in extra
    extra = [flag for flag in extra if flag != "--csv"]
    whole = train(pairs, tmp_path / "whole", *extra, csv=csv)
    torch.rand(7)  # what ran before must not matter
    resume = ["--resume", str(whole / "epoch_1.pt")]
    again = train(pairs, tmp_path / "again", *extra, *resume, csv=csv)
    one, first = load(whole / "epoch_2.pt"), load(whole / "epoch_1.pt")
    assert_same(one, load(again / "epoch_2.pt"))
    assert any(not torch.equal(v, first["state_dict"][k]) for k, v in one["state_dict"].items())
    if extra[1] in TEACHER or "--ema-decay" in extra:
        assert first["otter"]["teacher_state"]["num_updates"] == 1 + first["global_step"]
        assert any(
            not torch.equal(v, one["state_dict"][k]) for k, v in one["state_dict_ema"].items()
        )


@pytest.mark.parametrize("accum", [[], ["--accum-freq", "2"]], ids=["", "accum"])
def test_fixed_teacher(pairs, tmp_path, accum):
    teacher = train(pairs, tmp_path / "t", "--loss", "infonce", "--epochs", "1") / "epoch_1.pt"
    extra = ["--distill-model", "tiny-rn", "--distill-pretrained", str(teacher), *accum]
    extra += ["--loss", "otter", "--model", "tiny-vit"]
    path = train(pairs, tmp_path, *extra)
    checkpoint = load(path / "epoch_2.pt")
    assert "state_dict_ema" not in checkpoint
    entry = checkpoint["otter"]
    assert "teacher_state" not in entry and entry["distill_logit_scale"] != 3.9
    again = train(pairs, tmp_path / "again", *extra, "--resume", str(path / "epoch_1.pt"))
    assert_same(checkpoint, load(again / "epoch_2.pt"))


def test_a_step_of_the_command_is_a_step_by_hand(pairs, tmp_path, monkeypatch):
    """Teacher, second scale and the clipping of both with the weights included."""
    seen = {"batches": []}
    stock = open_clip_v4._stock_train_one_epoch

    def record(state, *rest, **kwargs):
        seen["student"] = copy.deepcopy(state.task.trainable_module)
        state.task.trainable_module.register_forward_pre_hook(
            lambda _, args, kwargs: seen["batches"].append(kwargs), with_kwargs=True
        )
        return stock(state, *rest, **kwargs)

    monkeypatch.setattr(open_clip_v4, "_stock_train_one_epoch", record)
    sizes = ["--epochs", "1", "--train-num-samples", "12", "--warmup", "0", "--workers", "0"]
    sgd = ["--opt", "timm/momentum", "--momentum", "0", "--wd", "0", "--lr", "0.1"]
    extra = ["--alpha", "0.3", "--grad-clip-norm", "0.5"]
    path = train(pairs, tmp_path, "--loss", "otter", "--model", "tiny-vit", *extra, *sgd, *sizes)
    checkpoint = load(path / "epoch_1.pt")

    student, (batch,) = seen["student"].train(), seen["batches"]
    before = copy.deepcopy(student.state_dict())
    with torch.no_grad():
        targets = {f"dist_{k}": v for k, v in student(**batch).items() if "features" in k}
    loss = OtterLoss(alpha=0.3)
    parameters = [*student.parameters(), *loss.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    sum(loss(**student(**batch), **targets, output_dict=True).values()).backward()
    # Without the clipping s_d would move some hundred times as far.
    assert nn.utils.get_total_norm([param.grad for param in parameters]) > 50
    nn.utils.clip_grad_norm_(parameters, 0.5)
    optimizer.step()
    assert_close(dict(student.state_dict()), dict(checkpoint["state_dict"]), rtol=1e-4, atol=1e-6)
    scale = checkpoint["otter"]["distill_logit_scale"]
    torch.testing.assert_close(scale, loss.distill_logit_scale.detach())
    decay = (1 + 2) / (10 + 2)
    for key, value in checkpoint["state_dict_ema"].items():
        expected = decay * before[key] + (1 - decay) * checkpoint["state_dict"][key]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def test_the_second_scale_starts_where_it_is_told(pairs, tmp_path):
    still = ["--epochs", "1", "--lr", "0", "--warmup", "0", "--init-distill-logit-scale", "2.5"]
    path = train(pairs, tmp_path, "--loss", "kd", *still) / "epoch_1.pt"
    assert load(path)["otter"]["distill_logit_scale"] == 2.5


def test_the_second_scale_is_part_of_the_clipped_norm():
    weight, scale = (nn.Parameter(torch.tensor([value])) for value in (3.0, 4.0))
    (weight**2 / 2 + scale**2 / 2).sum().backward()
    stock = nn.utils.clip_grad_norm_
    with open_clip_v4._clipped_too(scale):
        assert nn.utils.clip_grad_norm_((weight,), 1.0, norm_type=2.0) == 5
    torch.testing.assert_close(torch.cat([weight.grad, scale.grad]), torch.tensor([0.6, 0.8]))
    assert nn.utils.clip_grad_norm_ is stock


@pytest.mark.parametrize("loss", ["infonce", "otter"])
def test_accumulation_is_the_whole_batch(pairs, tmp_path, loss):
    rest = ["--model", "tiny-vit", "--epochs", "1", "--train-num-samples", "36", "--workers", "0"]
    extra = ["--loss", loss, *SGD, *rest, "--grad-clip-norm", "0.5"]
    one = train(pairs, tmp_path / "one", *extra)
    two = train(pairs, tmp_path / "two", *extra, "--batch-size", "6", "--accum-freq", "2")
    one, two = load(one / "epoch_1.pt"), load(two / "epoch_1.pt")
    assert_close(dict(one["state_dict"]), dict(two["state_dict"]), rtol=1e-3, atol=1e-5)
    if loss == "otter":
        scales = [x["otter"]["distill_logit_scale"] for x in (one, two)]
        torch.testing.assert_close(*scales, rtol=1e-4, atol=0)
        assert scales[0] != 3.9
        assert_close(one["state_dict_ema"], two["state_dict_ema"], rtol=1e-3, atol=1e-5)


def test_two_processes_train_as_one(pairs, tmp_path, model_configs):
    """DDP on the CPU: every weight, both scales and the teacher."""
    # Two steps over all 24 pairs, so that both runs see the same batches whatever their order.
    rows = (pairs / "pairs.csv").read_text().splitlines()[:25]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    extra = ["--loss", "otter", "--model", "tiny-vit", "--workers", "0", "--warmup", "0", *SGD]
    extra += ["--aug-cfg", "scale=(1.0,1.0)", "--epochs", "2", "--grad-clip-norm", "0.5"]
    whole = train(tmp_path, tmp_path / "one", *extra, "--batch-size", "24", csv=True)
    line = flags(tmp_path, tmp_path / "two", *extra, "--batch-size", "12", csv=True)
    command = ["--", str(HERE / "launch.py"), *line, "--local-loss", "--gather-with-grad"]
    torchrun(2, *command, env={"TEST_MODEL_CONFIGS": str(model_configs)})
    one = load(whole / "epoch_2.pt")
    two = load(tmp_path / "two" / "run" / "checkpoints" / "epoch_2.pt")
    for key in ("state_dict", "state_dict_ema"):
        assert_close(dict(one[key]), dict(two[key]), rtol=1e-4, atol=1e-6)
    scales = [x["otter"]["distill_logit_scale"] for x in (one, two)]
    torch.testing.assert_close(*scales, rtol=1e-6, atol=0)


def test_torchrun_with_everything_on_resumes_exactly(pairs, tmp_path, model_configs):
    extra = ["--loss", "otter", "--batch-size", "6", "--accum-freq", "2", "--grad-clip-norm", "1"]
    extra += ["--local-loss", "--gather-with-grad", "--model", "tiny-vit"]
    env, launch = {"TEST_MODEL_CONFIGS": str(model_configs)}, str(HERE / "launch.py")
    out = torchrun(2, "--", launch, *flags(pairs, tmp_path / "whole", *extra), env=env)
    assert "Target_entropy" in out
    whole = tmp_path / "whole" / "run" / "checkpoints"
    resume = ["--resume", str(whole / "epoch_1.pt")]
    torchrun(2, "--", launch, *flags(pairs, tmp_path / "again", *extra, *resume), env=env)
    again = tmp_path / "again" / "run" / "checkpoints" / "epoch_2.pt"
    assert_same(load(whole / "epoch_2.pt"), load(again))


def run(*words, path, **environment):
    """Run ``python WORDS`` with ``path`` as PYTHONPATH; returns its stdout."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def blocked(tmp_path):
    """A folder that keeps the plugin from being imported, and 4.x's sources."""
    package = tmp_path / "blocked" / "otter_openclip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('blocked')\n")
    return package.parent


def sources():
    return Path(open_clip.__file__).parent.parent


def released():
    """Path entries without 4.x's checkout; skips unless open_clip 3.x is installed under it."""
    try:
        version = importlib.metadata.version("open_clip_torch")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if not version.startswith("3."):
        pytest.skip(f"open_clip 3.x is not installed beside 4.x's checkout (found {version})")
    return []


def test_stock_open_clip_loads_and_resumes_the_checkpoint(pairs, tmp_path, model_configs):
    path = train(pairs, tmp_path, "--loss", "otter", "--epochs", "1") / "epoch_1.pt"
    keys = {"epoch", "name", "state_dict", "state_dict_ema", "optimizer"}
    keys |= {"global_step", "samples_seen", "otter"}
    checkpoint = load(path)
    assert checkpoint.keys() == keys
    assert checkpoint["optimizer"].keys() == {"state", "param_groups"}
    script = (
        "import sys, open_clip\n"
        "open_clip.add_model_config(sys.argv[1])\n"
        "open_clip.create_model('tiny-rn', pretrained=sys.argv[2])\n"
        "if open_clip.__version__.startswith('4.'):\n"
        "    from open_clip_train.main import main\n"
        "    main(sys.argv[3:])\n"
        "assert 'otter_openclip' not in sys.modules\n"
    )
    line = flags(pairs, tmp_path / "stock", "--resume", str(path), "--precision", "fp32")
    here = blocked(tmp_path)
    run("-c", script, model_configs, path, *line, path=[here, sources()])
    stock = load(tmp_path / "stock" / "run" / "checkpoints" / "epoch_2.pt")
    assert stock["epoch"] == 2 and stock["optimizer"].keys() == {"state", "param_groups"}
    run("-c", script, model_configs, path, *line, path=[here, *released()])


def test_losses_are_those_of_3x(pairs, tmp_path, model_configs):
    """The same command under both: the same data, weights and teacher, so the same losses."""
    # Without weight decay: 4.x spares other parameters from it.
    extra = ["--loss", "otter", *SGD, "--lr", "0.01"]
    line = flags(pairs, tmp_path / "3", *extra)
    environment = {"TEST_MODEL_CONFIGS": str(model_configs)}
    run(HERE / "launch.py", *line, path=[*released(), HERE.parent], **environment)
    train(pairs, tmp_path / "4", *extra)
    found = {}
    for version in ("3", "4"):
        log = (tmp_path / version / "run" / "out.log").read_text()
        steps = [text for text in log.splitlines() if "Train Epoch" in text]
        terms = ("Contrastive_loss", "Distill_loss", "Target_entropy")
        found[version] = torch.tensor(
            [
                [float(re.search(rf"{term}: ([\d.e-]+)", step)[1]) for term in terms]
                for step in steps
            ]
        )
    assert found["3"].shape == (12, 3) and len(found["3"].unique()) > 20
    torch.testing.assert_close(found["4"], found["3"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("strategy", "backend"), [("task", "aot_eager"), ("model", "eager")])
def test_torchcompile(pairs, tmp_path, strategy, backend):
    extra = ["--loss", "otter", *SGD, "--model", "tiny-vit", "--train-num-samples", "24"]
    extra += ["--epochs", "1"]
    compiled = ["--torchcompile", "--torchcompile-strategy", strategy]
    compiled += ["--torchcompile-backend", backend]
    path = train(pairs, tmp_path / "compiled", *extra, *compiled) / "epoch_1.pt"
    plain = train(pairs, tmp_path / "plain", *extra) / "epoch_1.pt"
    compiled, plain = load(path), load(plain)
    for key in ("state_dict", "state_dict_ema"):
        assert_close(dict(plain[key]), dict(compiled[key]), rtol=1e-3, atol=1e-5)


def test_a_killed_save_leaves_no_torn_checkpoint(pairs, tmp_path, monkeypatch):
    whole = train(pairs, tmp_path / "whole", "--loss", "otter")
    tear(monkeypatch, "epoch_2")
    with pytest.raises(SystemExit, match="disk full"):
        train(pairs, tmp_path, "--loss", "otter")
    monkeypatch.undo()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [p.name for p in checkpoints.glob("*.pt")] == ["epoch_1.pt"]
    train(pairs, tmp_path, "--loss", "otter", "--resume", "latest")
    assert_same(load(checkpoints / "epoch_2.pt"), load(whole / "epoch_2.pt"))


def test_loss_clip_is_stock(pairs, tmp_path, monkeypatch):
    seen = {}
    stock = open_clip_v4._stock_train_one_epoch

    def record(state, data, *rest, **kwargs):
        seen["task"] = type(state.task), type(state.task.loss)
        seen["stages"] = data["train"].dataloader.pipeline[0].dataset.pipeline
        return stock(state, data, *rest, **kwargs)

    monkeypatch.setattr(open_clip_v4, "_stock_train_one_epoch", record)
    path = train(pairs, tmp_path, "--epochs", "1", "--precision", "fp32") / "epoch_1.pt"
    assert seen["task"] == (CLIPTask, open_clip.ClipLoss)
    assert not any("repeatable" in type(stage).__module__ for stage in seen["stages"])
    assert load(path)["optimizer"].keys() == {"state", "param_groups"}
    for name in ("parse_args", "create_task", "create_optimizer", "get_data", "train_one_epoch"):
        assert "open_clip_v4" not in getattr(open_clip_main, name).__module__


def test_resuming_a_plain_checkpoint_warns(pairs, tmp_path, caplog):
    path = train(pairs, tmp_path, "--epochs", "1", "--precision", "fp32") / "epoch_1.pt"
    with caplog.at_level(logging.WARNING):
        train(pairs, tmp_path, "--loss", "otter", "--name", "b", "--resume", str(path))
    assert "the teacher starts as a copy of the student" in caplog.text
    with pytest.raises(ValueError, match="--pretrained in place of --resume"):
        train(
            *(pairs, tmp_path, "--loss", "otter", "--name", "c", "--resume", str(path)),
            *("--lock-image", "--lock-image-freeze-bn-stats"),
        )


def test_best_checkpoint_and_export(pairs, labelled, tmp_path):
    extra = ["--loss", "otter", "--model", "tiny-rn", "--zeroshot-data", str(labelled)]
    extra += ["--lr", "0.02"]
    path = train(
        pairs, tmp_path, *extra, "--zeroshot-frequency", "1", "--val-data", str(pairs / "00000.tar")
    )
    results = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in results] == [1, 2]
    assert {"clip_val_loss", "zeroshot-flat_hit@1"} <= results[0].keys()
    best = load(path / "best.pt")
    scores = [line["zeroshot-flat_hit@1"] for line in results]
    for epoch, score in enumerate(scores, 1):  # the student's, not the EMA's
        assert score == pytest.approx(plain_flat_hit(path / f"epoch_{epoch}.pt", labelled))
    epoch = scores.index(max(scores)) + 1
    judged = best.pop("zeroshot")
    assert (judged["epoch"], judged["weights"]) == (epoch, "student")
    assert_same(best, load(path / f"epoch_{epoch}.pt"))
    last = load(path / "epoch_2.pt")
    for weights, key in (("student", "state_dict"), ("teacher", "state_dict_ema")):
        folder = tmp_path / weights
        export_checkpoint(path / "epoch_2.pt", folder, weights=weights)
        model = open_clip.create_model(f"local-dir:{folder}")
        assert_close(dict(last[key]), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss", "ottr"], "invalid choice: 'ottr'"),
        (["--loss", "otter", "--sinkhorn-lamda", "1"], "did you mean --sinkhorn-lambda?"),
        (["--loss", "otter", "--siglip"], "drop --siglip"),
        (["--loss", "otter", "--model", "coca_ViT-B-32"], "CoCa model coca_ViT-B-32"),
        (["--loss", "otter", "--fsdp"], "drop --fsdp to train with DDP"),
        (["--loss", "ls", "--use-naflex"], "drop --use-naflex"),
        (["--loss", "otter", "--model", "naflexgenlip_so150m2"], "a generative model"),
        (["--loss", "otter", "--model", "naflexgenlap_test_1d"], "a generative model"),
        (["--loss", "otter", "--model", "CLAP-HTSAT-tiny"], "does not go with audio"),
        (["--loss", "kd", "--dataset-type", "webdataset-audio"], "does not go with audio"),
        (
            ["--loss", "otter", "--torchcompile", "--torchcompile-strategy", "step"],
            "use task or model",
        ),
        (
            ["--loss", "otter", "--bucket-prefetch-pools", "2"],
            "--loss otter does not go with --bucket",
        ),
        (
            ["--ema-decay", "0.9", "--bucket-prefetch-pools", "2"],
            "--ema-decay does not go with --bu",
        ),
        (["--loss", "otter", "--distill-model", "RN50"], "must be given together"),
        (["--zeroshot-data", "LABELLED", "--fsdp"], "drop it, or --fsdp"),
        (["--reference-crop", "--use-naflex"], "drop it or --use-naflex"),
        (["--ema-decay", "0.9", "--fsdp"], "drop it, or --fsdp"),
        (["--horovod"], "unrecognized arguments: --horovod"),
    ],
)
def test_refused_before_anything_is_read(words, message, labelled, tmp_path, capsys):
    words = [str(labelled) if word == "LABELLED" else word for word in words]
    with pytest.raises(SystemExit, match="2"):
        main(["--train-data", "missing.tar", "--logs", str(tmp_path / "logs"), *words])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_precision_on_a_cpu(tmp_path):
    def precision(*words):
        return parse_args("--device", "cpu", *words).precision

    assert precision("--loss", "otter") == "fp32"
    assert precision("--loss", "otter", "--precision", "amp_bf16") == "amp_bf16"
    assert precision() == "amp_bf16"  # 4.x's own default


def test_clip_alone_takes_open_clips_prefetching():
    assert parse_args("--bucket-prefetch-pools", "2").bucket_prefetch_pools == 2
