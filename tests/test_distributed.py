"""Several processes: the same gradients as one process on the whole batch, and real torchrun runs."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
from distributed_worker import has_teacher
from plain_losses import features, plain_objective
from training_helpers import assert_same, flags, load, train

HERE = Path(__file__).parent


def torchrun(processes, *command, env=None, cwd=None):
    """Run on the CPU with gloo; returns stdout and stderr together."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(processes), *command),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="session", params=[1, 2, 3, 4])
def ranks(request, tmp_path_factory):
    """Results of every loss, flag and implementation on each of R ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(request.param, str(HERE / "distributed_worker.py"), str(folder))
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(request.param)]


def plain_gradients(name, *, world, local, with_grad):
    """The whole batch in one process, by plain autograd, under open_clip's flags."""
    _, keywords = distributed_worker.MAKE[name]
    images, texts, *teacher = features(distributed_worker.COUNT, distributed_worker.WIDTH, seed=5)
    images.requires_grad_(), texts.requires_grad_()
    # The losses hold 3.9 as a float32.
    scales = [torch.tensor(x).double().requires_grad_() for x in (3.0, 3.9)]
    given = [x.exp() for x in scales[: 1 + has_teacher(name)]]
    if has_teacher(name):
        given.append(teacher)
    alone = world if name == "otter-alone" and local else None
    # With --local-loss alone a feature learns only from the direction in which it is a row.
    detach = local and not with_grad and world > 1
    value = sum(
        plain_objective(images, texts, *given, **keywords, ranks=alone, detach_columns=detach)
    )
    value.backward()
    found = {"images": images.grad, "texts": texts.grad, "value": value.detach()}
    found["scale"] = scales[0].grad
    if has_teacher(name):
        found["distill_scale"] = scales[1].grad
    return found


@pytest.mark.parametrize(("local", "with_grad"), distributed_worker.FLAGS)
@pytest.mark.parametrize("name", distributed_worker.MAKE)
def test_gradients_are_those_of_one_process(ranks, name, local, with_grad):
    world = len(ranks)
    expected = plain_gradients(name, world=world, local=local, with_grad=with_grad)
    for impl in distributed_worker.impls(name):
        found = [rank[name, local, with_grad, impl] for rank in ranks]
        # DDP averages the parameters' gradients over ranks: so do these. Without gathered gradients
        # and local losses, open_clip leaves a factor of R to the learning rate.
        share = 1 if not local and not with_grad else world
        for key in ("images", "texts"):
            joined = torch.cat([f[key] for f in found]) / share
            torch.testing.assert_close(joined, expected[key], rtol=1e-6, atol=1e-9)
        for key in expected.keys() - {"images", "texts"}:
            mean = torch.stack([f[key] for f in found]).mean()
            torch.testing.assert_close(mean, expected[key].double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["ls", "kd", "otter", "otter-sharp", "otter-keep"])
def test_what_a_step_sends(ranks, name):
    """Numbers handed to torch.distributed by a rank; nothing of size B x N among them."""
    world, (count, width) = len(ranks), (distributed_worker.COUNT, distributed_worker.WIDTH)
    local = count // world
    make, _ = distributed_worker.MAKE[name]
    for impl in distributed_worker.impls(name):
        calls = list(ranks[0][name, True, True, impl]["calls"])
        if world == 1:
            assert calls == []
            continue
        # Features: the texts with their gradient back, and the teacher's two sets.
        to_all, to_owners = "all_gather", "all_to_all_single"
        expected = [(to_all, local * width), (to_owners, count * width)]
        norms = 1
        if has_teacher(name):
            expected += 2 * [(to_all, local * width)]
            norms = 3
        # The softmax normalisers of both terms and the plan's, once; each an all-reduce's two halves.
        expected += [(to_owners, norms * count), (to_all, norms * local)]
        iterations = getattr(make(), "iterations", 0)
        if name == "otter-sharp":  # the log domain
            expected += iterations * [(to_owners, 2 * count), (to_all, 2 * local)]
        else:
            expected += iterations * [("all_reduce", 2 * count)]
        assert sorted(calls) == sorted(expected)


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


def test_torchrun_with_everything_on_resumes_exactly(pairs, labelled, tmp_path, model_configs):
    extra = ["--loss", "otter", "--batch-size", "6", "--accum-freq", "2", "--grad-clip-norm", "1"]
    extra += ["--local-loss", "--gather-with-grad", "--model", "tiny-vit"]
    extra += ["--zeroshot-data", str(labelled), "--zeroshot-frequency", "1"]
    env = {"TEST_MODEL_CONFIGS": str(model_configs)}
    launch = str(HERE / "launch.py")
    out = torchrun(2, "--", launch, *flags(pairs, tmp_path / "whole", *extra), env=env)
    assert "Target_entropy" in out
    whole = tmp_path / "whole" / "run" / "checkpoints"
    assert len((whole / "results.jsonl").read_text().splitlines()) == 2  # rank 0 alone
    assert load(whole / "best.pt")["epoch"] in (1, 2)
    resume = ["--resume", str(whole / "epoch_1.pt")]
    torchrun(2, "--", launch, *flags(pairs, tmp_path / "again", *extra, *resume), env=env)
    again = tmp_path / "again" / "run" / "checkpoints" / "epoch_2.pt"
    assert_same(load(whole / "epoch_2.pt"), load(again))


def test_readme_form_of_torchrun(tmp_path):
    """The module after ``-m --``: the plain form is ambiguous with torchrun's own flags."""
    out = torchrun(1, "-m", "--", "otter_openclip.train", "--help")
    assert "--sinkhorn-lambda" in out and "--train-data" in out
