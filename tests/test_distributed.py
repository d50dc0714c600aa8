"""Several processes: the same gradients as one process on the whole batch, and training runs."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import forks
import pytest
import torch
from distributed_worker import COUNT, FLAGS, MAKE, WIDTH, impls, one_rank
from loss_cases import SETTINGS, features, run
from patched import ROOT, copy_packages
from torch.multiprocessing import start_processes
from training_helpers import assert_same, flags, load, train

from otter_openclip import OtterLoss, sinkhorn

LAUNCH = Path(__file__).parent / "launch.py"


def torchrun(processes, *command, env):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line = [*launcher, "--nproc_per_node", str(processes), *command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.fixture(scope="session", params=[2, 3])
def ranks(request, tmp_path_factory):
    """Results of every loss, flag and implementation on each of R ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    # Forks: importing torch once is enough.
    start_processes(one_rank, (request.param, str(folder)), request.param, start_method="fork")
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(request.param)]


def rows_alone(loss, images, texts):
    """What ``--local-loss`` alone is: a feature learns only from the direction in which it is a row."""
    return images @ texts.detach().T, texts @ images.detach().T


class PlansAlone(OtterLoss):
    """``--ot-scope local`` on some ranks: each transports its own rows."""

    def _target(self, similarity):
        super()._target(similarity)
        cost = -similarity
        cost.fill_diagonal_(torch.inf)
        plans = [sinkhorn(rows, self.epsilon, self.iterations) for rows in cost.chunk(self.ranks)]
        errors = [(plan.sum(dim=1) * len(plan) - 1).abs().mean() for plan in plans]
        self.target_statistics["marginal_error"] = torch.stack(errors).mean()
        target = torch.cat([plan / plan.sum(dim=1, keepdim=True) for plan in plans])
        self.target_statistics["target_entropy"] = torch.special.entr(target).sum(dim=1).mean()
        self.target_statistics["target_top_share"] = target.amax(dim=1).mean()
        return target


def of_one_process(name, *, world, local, with_grad):
    """The whole batch in one process, by the plain formulas, under open_clip's flags."""
    make = SETTINGS["ls-0"] if name == "infonce" else MAKE[name]
    loss = make(impl="plain").double()
    if local and not with_grad:
        loss._cosines = types.MethodType(rows_alone, loss)
    if local and name == "otter-local":
        loss.__class__ = PlansAlone
        loss.ranks = world
    return run(loss, features(COUNT, WIDTH, seed=5))


@pytest.mark.parametrize(("local", "with_grad"), FLAGS)
@pytest.mark.parametrize("name", MAKE)
def test_ranks_are_one_process(ranks, name, local, with_grad):
    """Values, gradients of towers and scales, and statistics, of every implementation."""
    world = len(ranks)
    expected = of_one_process(name, world=world, local=local, with_grad=with_grad)
    # DDP averages the parameters' gradients over ranks: so do these. Without gathered gradients and
    # local losses, open_clip leaves a factor of R to the learning rate.
    share = 1 if not local and not with_grad else world
    for impl in impls(name):
        found = [rank[name, local, with_grad, impl] for rank in ranks]
        assert found[0].keys() == expected.keys() | {"calls"}
        for key, value in expected.items():
            if value.ndim:
                joined = torch.cat([f[key] for f in found]) / share
            else:
                joined = torch.stack([f[key] for f in found]).mean()
                if key == "distill_scale gradient":  # a loop of one's own averages nothing
                    joined = found[0][key]
            torch.testing.assert_close(joined, value, rtol=1e-6, atol=1e-9, msg=f"{impl} {key}")


def test_one_pair_on_each_rank_is_finite(ranks):
    for found in (results["one pair"] for results in ranks):
        assert len(found) == 9 and all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("name", ["kd", "otter", "otter-sharp", "otter-keep"])
def test_what_a_step_sends(ranks, name):
    """Numbers handed to torch.distributed by a rank; nothing of size B x N among them."""
    local = COUNT // len(ranks)
    for impl in ("dense", "streaming"):
        calls = list(ranks[0][name, True, True, impl]["calls"])
        # Features: the texts with their gradient back, and the teacher's two sets.
        to_all, to_owners = "all_gather", "all_to_all_single"
        expected = [(to_all, local * WIDTH), (to_owners, COUNT * WIDTH)]
        expected += 2 * [(to_all, local * WIDTH)]
        # The softmax normalisers of both terms, in an all-reduce's two halves.
        expected += [(to_owners, 2 * COUNT), (to_all, 2 * local)]
        iterations = MAKE[name]().iterations
        if name in ("otter-sharp", "kd"):  # the log domain
            expected += iterations * [(to_owners, 2 * COUNT), (to_all, 2 * local)]
            expected += [(to_owners, COUNT), (to_all, local)]
        else:
            expected += [("all_reduce", COUNT), *iterations * [("all_reduce", 2 * COUNT)]]
        expected += [("all_reduce", 1)]  # the gradient of s_d
        assert sorted(calls) == sorted(expected)


@pytest.mark.parametrize("loss", ["ls", "otter"])
def test_two_processes_train_as_one(pairs, tmp_path, model_configs, loss):
    # Two steps over all 24 pairs, so that both runs see the same batches whatever their order.
    rows = (pairs / "pairs.csv").read_text(encoding="utf-8").splitlines()[:25]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    extra = f"--loss {loss} --model tiny-vit --warmup 0 --aug-cfg scale=(1.0,1.0)".split()
    extra += "--opt timm/momentum --momentum 0.9 --wd 0 --lr 0.1 --epochs 1".split()
    one = train(tmp_path, tmp_path / "one", *extra, "--batch-size", "24", csv=True)
    line = flags(tmp_path, tmp_path / "two", *extra, "--batch-size", "12", csv=True)
    command = [LAUNCH, *line, "--local-loss", "--gather-with-grad"]
    forks.ranks(2, *command, env={"TEST_MODEL_CONFIGS": str(model_configs)})
    one = load(one / "epoch_1.pt")
    two = load(tmp_path / "two" / "run" / "checkpoints" / "epoch_1.pt")
    near = {"rtol": 1e-4, "atol": 1e-6}
    state = {f"module.{key}": value for key, value in one["state_dict"].items()}
    torch.testing.assert_close(two["state_dict"], state, **near)
    if loss == "otter":
        mine, its = (x["otter"]["distill_logit_scale"] for x in (one, two))
        torch.testing.assert_close(its, mine, rtol=1e-6, atol=0)
        torch.testing.assert_close(two["state_dict_ema"], one["state_dict_ema"], **near)


def test_torchrun_with_everything_on_resumes_exactly(pairs, labelled, tmp_path, model_configs):
    """The README's form of torchrun: the plain ``-m`` is ambiguous with torchrun's own flags."""
    # Nothing registers the tests' models there: they lie among open_clip's own.
    packages = copy_packages("open_clip", tmp_path / "packages")
    shutil.copytree(model_configs, packages / "open_clip" / "model_configs", dirs_exist_ok=True)
    path = [packages, ROOT]
    extra = "--loss otter --batch-size 6 --accum-freq 2 --grad-clip-norm 1 --local-loss".split()
    extra += "--gather-with-grad --model tiny-vit --workers 1 --train-num-samples 48".split()
    extra += f"--zeroshot-data {labelled} --zeroshot-frequency 1".split()
    line = flags(pairs, tmp_path / "whole", *extra)
    out = forks.ranks(2, "-m", "otter_openclip.train", *line, path=path)
    assert "Target_entropy" in out
    whole = tmp_path / "whole" / "run" / "checkpoints"
    # Rank 0 alone writes them.
    assert len((whole / "results.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert load(whole / "best.pt")["epoch"] in (1, 2)
    line = flags(pairs, tmp_path / "again", *extra, "--resume", str(whole / "epoch_1.pt"))
    env = {"PYTHONPATH": os.pathsep.join(map(str, path))}
    torchrun(2, "-m", "--", "otter_openclip.train", *line, env=env)
    again = tmp_path / "again" / "run" / "checkpoints" / "epoch_2.pt"
    assert_same(load(whole / "epoch_2.pt"), load(again))


def test_ranks_fill_a_feature_cache_together(pairs, tmp_path, model_configs, caplog):
    """What two ranks kept is all that one process needs, whatever the shards it reads."""
    extra = ["--loss", "otter", "--model", "tiny-timm", "--lock-image", "--batch-size", "6"]
    extra += ["--feature-cache", str(tmp_path / "cache"), "--epochs", "1"]
    line = flags(pairs, tmp_path / "two", *extra, "--local-loss", "--gather-with-grad")
    out = forks.ranks(2, LAUNCH, *line, env={"TEST_MODEL_CONFIGS": str(model_configs)})
    assert "2 of 2 shards to encode" in out and "Target_entropy" in out
    assert len(list(tmp_path.glob("cache/image-*/*.npy"))) == 2
    caplog.set_level("INFO")
    train(pairs, tmp_path / "one", *extra)
    assert "0 of 2 shards to encode" in caplog.text
