"""On a GPU: precision, read-backs, NCCL. OTTER_TEST_DEVICE=cpu tries these tests themselves.

The tests against recorded values are parametrised by device where they are.
"""

import json
import os
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from loss_cases import SETTINGS, assert_close, features, run
from test_distributed import torchrun
from test_step import beside_its_teacher
from test_teacher import check_trajectory
from training_helpers import assert_same, flags, load, train

from otter_openclip import DistillationLoss, OtterLoss, cli
from otter_openclip.model_folders.towers import make_towers

HERE = Path(__file__).parent
DEVICE = os.environ.get("OTTER_TEST_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@pytest.mark.parametrize("impl", ["plain", "dense", "streaming"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_implementation_as_plain_in_float64(name, dtype, impl):
    inputs = [x.to(dtype) for x in features(200, 32)]
    expected = run(SETTINGS[name](impl="plain").double(), [x.double() for x in inputs])
    with torch.device(DEVICE):
        found = run(SETTINGS[name](impl=impl).to(DEVICE), [x.to(DEVICE) for x in inputs])
    found = {key: value.cpu() for key, value in found.items()}
    assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize(
    ("case", "make_loss"),
    [("otter", OtterLoss), ("kd", partial(DistillationLoss, vv_coef=1.0, tt_coef=1.0))],
)
def test_recorded_trajectories_under_autocast(case, make_loss, dtype, bound):
    """Weights in float32, towers under ``amp`` and ``amp_bf16``; loss and teacher stay exact."""
    autocast = partial(torch.autocast, DEVICE, dtype, enabled=dtype != torch.float32)
    check_trajectory(case, make_loss, 0.999, 0.05, DEVICE, torch.float32, autocast, bound)


@pytest.mark.parametrize("impl", ["plain", "dense", "streaming"])
@pytest.mark.parametrize("model", ["tiny-vit", "tiny-rn"])
def test_a_step_waits_for_nothing(model, impl):
    """Forward, loss, backward, optimizer, EMA: no read-back from the device."""
    student = open_clip.create_model(model, output_dict=True, device=DEVICE)
    loss = OtterLoss(impl=impl).to(DEVICE)
    both, teacher = beside_its_teacher(student)
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.1)
    images = torch.randn(8, 3, 32, 32, device=DEVICE)
    texts = torch.randint(1, 99, (8, 8), device=DEVICE)

    def step():
        optimizer.zero_grad()
        sum(loss(**both(images, texts), output_dict=True).values()).backward()
        optimizer.step()
        teacher.update(student)

    mode = torch.cuda.set_sync_debug_mode if DEVICE == "cuda" else str
    step()  # what is set up once may wait
    mode("error")
    try:
        step()
    finally:
        mode("default")


@pytest.mark.parametrize("precision", ["fp32", "amp", "amp_bf16"])
@pytest.mark.parametrize("extra", [[], ["--torchcompile"], ["--accum-freq", "2"]], ids=str)
def test_training(pairs, tmp_path, precision, extra):
    if DEVICE == "cpu" and (extra == ["--torchcompile"] or precision != "fp32"):
        pytest.skip("for a GPU")
    line = ["--loss", "otter", "--device", DEVICE, "--precision", precision, "--model", "tiny-vit"]
    line += ["--workers", "0", *extra]
    saved = load(train(pairs, tmp_path, *line) / "epoch_2.pt")
    weights = [*saved["state_dict"].values(), *saved["state_dict_ema"].values()]
    assert all(torch.isfinite(x).all() for x in weights)


def test_fit_is_the_cpus(towers, pairs, labelled, tmp_path):
    """The command, which writes a model and looks for captions that fit better on the CPU."""
    make_towers(tmp_path / "towers", **towers, image_size=32, context_length=20)
    line = f"--model local-dir:{tmp_path}/towers --train-data {pairs}/{{00000..00001}}.tar"
    line += f" --feature-cache {tmp_path}/features --precision fp32 --val {labelled}"
    fits = []
    for device in ("cpu", DEVICE):
        out = tmp_path / str(len(fits))
        assert cli.main(["fit", str(out), *line.split(), "--device", device]) == 0
        fits.append(json.loads((out / "fit.json").read_text(encoding="utf-8")))
    one, other = fits
    for name in ("ridge_images", "ridge_texts", "power", "logit_scale", "embed_dim"):
        assert one[name] == other[name]
    for name in ("correlations", "wrong_share"):
        assert one[name] == pytest.approx(other[name], abs=1e-3)


def test_resume_is_exact_through_nccl(pairs, tmp_path, model_configs):
    """One process of DDP on one device, with deterministic kernels."""
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    extra = ["--loss", "otter", "--device", DEVICE, "--dist-backend", backend, "--workers", "0"]
    extra += ["--local-loss", "--gather-with-grad", "--model", "tiny-vit", "--save-frequency", "1"]
    env = {"TEST_MODEL_CONFIGS": str(model_configs), "DETERMINISTIC": "1"}
    env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

    def launched(folder, *more):
        line = flags(pairs, folder, *extra, *more)
        torchrun(1, "--", str(HERE / "launch.py"), *line, env=env)
        return folder / "run" / "checkpoints"

    whole = launched(tmp_path / "whole")
    again = launched(tmp_path / "again", "--resume", str(whole / "epoch_1.pt"))
    assert_same(load(whole / "epoch_2.pt"), load(again / "epoch_2.pt"))
