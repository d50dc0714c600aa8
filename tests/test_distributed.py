"""Several processes: the same gradients as one process on the whole batch, and real torchrun runs."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
from training_helpers import assert_same, flags, load, train

HERE = Path(__file__).parent


def torchrun(processes, *command, env=None):
    """Run on the CPU with gloo; returns stdout and stderr together."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(processes), *command),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.mark.parametrize("world", [2, 3, 4])
def test_gradients_are_those_of_one_process(world, tmp_path):
    torchrun(world, str(HERE / "distributed_worker.py"), str(tmp_path))
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(world)]
    for name, make in distributed_worker.MAKE.items():
        expected = distributed_worker.gradients(make().double())
        for local in (True, False):
            found = [rank[name, local] for rank in ranks]
            # DDP averages the parameters' gradients over ranks: so do these.
            for key in ("images", "texts"):
                joined = torch.cat([f[key] for f in found]) / world
                torch.testing.assert_close(joined, expected[key], msg=f"{name} {local} {key}")
            for key in expected.keys() - {"images", "texts"}:
                mean = torch.stack([f[key] for f in found]).mean()
                torch.testing.assert_close(mean, expected[key], msg=f"{name} {local} {key}")


@pytest.mark.parametrize("loss", ["infonce", "ls", "kd", "otter"])
def test_two_processes_train_as_one(pairs, tmp_path, model_configs, loss):
    """DDP on the CPU over two steps: every weight and both scales as in one process."""
    sgd = [
        "--opt",
        "timm/momentum",
        "--momentum",
        "0.9",
        "--wd",
        "0",
        "--lr",
        "0.1",
        "--epochs",
        "1",
    ]
    # Two steps over all 24 pairs, so that both runs see the same batches whatever their order.
    rows = (pairs / "pairs.csv").read_text().splitlines()[:25]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    extra = ["--loss", loss, "--model", "tiny-vit", "--workers", "0", "--warmup", "0", *sgd]
    extra += ["--aug-cfg", "scale=(1.0,1.0)", "--save-frequency", "1"]
    one = train(tmp_path, tmp_path / "one", *extra, "--batch-size", "24", csv=True)
    line = flags(tmp_path, tmp_path / "two", *extra, "--batch-size", "12", csv=True)
    command = ["--", str(HERE / "launch.py"), *line, "--local-loss", "--gather-with-grad"]
    torchrun(2, *command, env={"TEST_MODEL_CONFIGS": str(model_configs)})
    one = load(one / "epoch_1.pt")
    two = load(tmp_path / "two" / "run" / "checkpoints" / "epoch_1.pt")
    for key, value in one["state_dict"].items():
        other = two["state_dict"][f"module.{key}"]
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-6, msg=key)
    if loss in ("kd", "otter"):
        mine, its = (x["optimizer"]["otter"] for x in (one, two))
        torch.testing.assert_close(
            its["distill_logit_scale"], mine["distill_logit_scale"], rtol=1e-6, atol=0
        )
        for key, value in mine["teacher"].items():
            torch.testing.assert_close(its["teacher"][key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_torchrun_with_everything_on_resumes_exactly(pairs, tmp_path, model_configs):
    extra = ["--loss", "otter", "--batch-size", "6", "--accum-freq", "2", "--grad-clip-norm", "1"]
    extra += ["--local-loss", "--gather-with-grad", "--model", "tiny-vit"]
    env = {"TEST_MODEL_CONFIGS": str(model_configs)}
    launch = str(HERE / "launch.py")
    out = torchrun(2, "--", launch, *flags(pairs, tmp_path / "whole", *extra), env=env)
    assert "Target_entropy" in out
    whole = tmp_path / "whole" / "run" / "checkpoints"
    resume = ["--resume", str(whole / "epoch_1.pt")]
    torchrun(2, "--", launch, *flags(pairs, tmp_path / "again", *extra, *resume), env=env)
    again = tmp_path / "again" / "run" / "checkpoints" / "epoch_2.pt"
    assert_same(load(whole / "epoch_2.pt"), load(again))


def test_readme_form_of_torchrun(tmp_path):
    """The module after ``-m --``: the plain form is ambiguous with torchrun's own flags."""
    out = torchrun(1, "-m", "--", "otter_openclip.train", "--help")
    assert "--sinkhorn-lambda" in out and "--train-data" in out
