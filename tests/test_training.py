"""The training command: real short runs of open_clip's loop with the plugin in it."""

import copy
import random
import re
from argparse import Namespace
from functools import partial
from pathlib import Path
from unittest import mock

import forks
import open_clip
import pytest
import torch
import training_helpers
from open_clip_train import main as open_clip_main
from open_clip_train.data import SharedEpoch
from training_helpers import COMMON, assert_same, flags, hide_plugin, load, train

from otter_openclip import OtterLoss
from otter_openclip.replacing import replaced
from otter_openclip.training import launcher, order, plugin, resume

FROZEN = "--model HF --lock-image --lock-text --lock-text-freeze-layer-norm"


@pytest.mark.parametrize(
    "words",
    [
        "--loss otter --workers 2 --model tiny-timm",  # it has dropout
        "--loss otter --dataset-resampled --train-num-samples 60 --workers 1",
        "--loss kd --csv --teacher-mode eval",
        "--loss infonce --lr-scheduler const",
        "--loss otter --accum-freq 2 --batch-size 6 --opt timm/momentum --momentum 0.9 --wd 0",
        "--loss otter --precision pure_bf16",
        "--loss otter --model tiny-vit --distill-model tiny-rn --distill-pretrained T ",
        "--loss kd --accum-freq 2 --distill-model tiny-rn --distill-pretrained T ",
        f"--loss otter {FROZEN} --accum-freq 2 --batch-size 6",
        f"--loss otter {FROZEN} --precision amp_bf16 --teacher-mode eval",
        f"--loss otter {FROZEN} --feature-cache F --precision amp_bf16",
        f"--loss otter {FROZEN} --feature-cache F --feature-dropout 0.5 --ema-decay 0",
        f"--loss otter {FROZEN} --feature-cache F --feature-dropout 0.5 --accum-freq 2",
    ],
)
def test_resume_is_exact(pairs, tmp_path, words, hf_model, begun):
    csv = "--csv" in words
    words = words.replace("--csv", "").replace(" HF ", f" {hf_model} ")
    words = words.replace(" F ", f" {tmp_path}/features ").replace(" T ", f" {begun} ")
    whole = train(pairs, tmp_path / "whole", words, csv=csv)
    torch.rand(7)  # what ran before must not matter
    again = train(pairs, tmp_path / "again", f"{words} --resume {whole / 'epoch_1.pt'}", csv=csv)
    assert_same(load(whole / "epoch_2.pt"), load(again / "epoch_2.pt"))


def test_order_follows_from_seed_rank_worker_epoch_and_pass_alone(monkeypatch):
    """Each changes it, a pass over the shards within an epoch too; nothing that ran before does."""

    def draw(seed=1, rank=2, worker=3, epoch=4, passes=0, before=()):
        monkeypatch.setattr(order, "_worker_id", lambda: worker)
        shared, rng = SharedEpoch(0), random.Random()
        stage = order._SeedPass(shared, seed, rank, rng)
        for value in (*before, *[epoch] * (passes + 1)):
            shared.set_value(value)
            assert stage("source") == "source"
        return rng.random()

    same = draw()
    assert draw() == same == draw(before=(3,)) == draw(before=(0, 1, 1, 1, 2))
    others = [
        draw(**{name: value})
        for name in ("seed", "rank", "worker", "epoch", "passes")
        for value in (7, 8)
    ]
    assert len({same, *others}) == 11
    assert draw(passes=2, before=(3,)) == draw(passes=2)


def test_epochs_and_seeds_differ(pairs, tmp_path, monkeypatch):
    orders, stock = [], launcher._stock_train_one_epoch

    def record(model, data, loss, epoch, *rest, **kwargs):
        data["train"].set_epoch(epoch)
        orders.append(torch.cat([texts for _, texts in data["train"].dataloader]))
        return stock(model, data, loss, epoch, *rest, **kwargs)

    monkeypatch.setattr(launcher, "_stock_train_one_epoch", record)
    for words in ("a --seed 0", "b --seed 0", "c --seed 1"):
        train(pairs, tmp_path, f"--loss infonce --name {words}")
    assert torch.equal(orders[0], orders[2]) and torch.equal(orders[1], orders[3])
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[4])


def test_stock_open_clip_loads_and_resumes_the_checkpoint(pairs, tmp_path, model_configs):
    path = train(pairs, tmp_path, "--loss otter --epochs 1") / "epoch_1.pt"
    script = (
        "import sys, open_clip\n"
        f"open_clip.add_model_config({str(model_configs)!r})\n"
        f"open_clip.create_model('tiny-rn', pretrained={str(path)!r})\n"
        "from open_clip_train.main import main\n"
        "main(sys.argv[1:])\n"
        "assert 'otter_openclip' not in sys.modules\n"
    )
    line = flags(pairs, tmp_path / "stock", f"--resume {path} --precision fp32")
    done = forks.run("-c", script, *line, path=[hide_plugin(tmp_path / "blocked")])
    assert done.returncode == 0, done.stderr
    stock = load(tmp_path / "stock" / "run" / "checkpoints" / "epoch_2.pt")
    assert stock["optimizer"].keys() == {"state", "param_groups"}


@pytest.fixture(scope="module")
def begun(pairs, tmp_path_factory):
    """The checkpoint of an epoch of tiny-rn with its image tower locked."""
    words = "--loss otter --lock-image --epochs 1"
    return train(pairs, tmp_path_factory.mktemp("begun"), words) / "epoch_1.pt"


@pytest.mark.parametrize(("prefix", "bare"), [("module.", True), ("_orig_mod.module.", False)])
def test_resuming_weights_saved_in_a_wrapper(pairs, tmp_path, caplog, begun, prefix, bare):
    checkpoint = load(begun)
    state = {prefix + key: value for key, value in checkpoint["state_dict"].items()}
    torch.save(state if bare else checkpoint | {"state_dict": state}, tmp_path / "start.pt")
    words = "--loss otter --lock-image --lr 0 --resume"
    found = load(train(pairs, tmp_path, words, tmp_path / "start.pt") / "epoch_2.pt")["state_dict"]
    expected = checkpoint["state_dict"]["text_projection"]
    torch.testing.assert_close(found["text_projection"], expected)
    train(pairs, tmp_path, words, begun, "--epochs 1 --name done")
    assert "has seen 1 of --epochs 1: nothing is left to train" in caplog.text


def test_weights_of_one_process_are_resumed_by_several():
    args = Namespace(distributed=True, train_data=None)
    found = resume._fitted(args, {"epoch": 1, "state_dict": {"weight": torch.ones(2)}})
    assert found["state_dict"].keys() == {"module.weight"}


def test_warmup_is_a_tenth_of_the_run_unless_told(pairs, tmp_path, caplog, monkeypatch):
    """open_clip's default of 10,000 steps would keep a short run's rate at nothing."""
    monkeypatch.setattr(training_helpers, "COMMON", COMMON.replace("--warmup 1", ""))
    train(pairs, tmp_path, "--loss otter --batch-size 36 --epochs 10")
    assert "Warmup: 2 of the run's 20 steps" in caplog.text
    rates = [float(rate) for rate in re.findall(r"LR: ([\d.]+)", caplog.text)]
    assert rates[:3] == [0.005, 0.01, 0.01] and len(rates) == 20


def test_a_warmup_beyond_the_run(pairs, tmp_path, caplog):
    words = "--epochs 1 --warmup 7 --precision fp32"
    said = r"--warmup 7 is longer than the run's 6 steps, so .* below --lr 0.01; lower it"
    with pytest.raises(SystemExit, match=said):
        train(pairs, tmp_path, "--loss ls", words)
    train(pairs, tmp_path, "--loss clip --siglip --ema-decay 0.9", words)  # open_clip's own loss
    assert re.search(said, caplog.text)


TEACHER = "--loss kd --distill-model tiny-rn --distill-pretrained"
REFUSED = {
    "--loss ls --siglip": "tiny-rn has a logit_bias, which --loss ls cannot use",
    "--loss otter --model RN5O": "^otter-openclip train: error: --model RN5O: .*RN5O",
    # A fixed teacher that is not there, or would misread the student's images or tokens.
    f"{TEACHER} no.pt": "--distill-model tiny-rn: Pretrained value",
    f"{TEACHER} {__file__}": "--distill-model tiny-rn: Weights only load failed",
    "--model tiny-vit --resume T": "--resume .*epoch_1.pt does not fit --model: Missing key",
    f"{TEACHER} T --force-image-size 64": r"is \(32, 32\), the student's \(64, 64\); take",
    f"{TEACHER} T --image-mean 0.5 0.4 0.3": r"image mean is \(0.481",
    f"{TEACHER} T --image-std 0.5 0.4 0.3": r"image std is \(0.268",
    f"{TEACHER} T --force-context-length 20": "is 8, the student's 20; take another",
    f"{TEACHER} T --model HF": "49408 words, .*; take another teacher",
    # Locks that open_clip cannot take, or not with kept features.
    "--model HF --lock-text --lock-text-unlocked-layers 1": "'unlocked_layers': 1.*layer_attr",
    "--model tiny-vit --lock-text": r"'freeze_layer_norm': False.*AssertionError",
    "--lock-image --lock-image-unlocked-groups 1": "'unlocked_groups': 1.*AssertionError",
    "--lock-image --lock-text --lock-text-freeze-layer-norm": "leave nothing of --model tiny-rn",
    "--model tiny-timm --force-patch-dropout 0.5": "--model tiny-timm: .*patch_drop",
    "--lock-text --lock-text-freeze-layer-norm --feature-cache F": "add --force-custom-text",
    "--model HF --lock-text --feature-cache F": "embeddings.LayerNorm.weight is trained",
    "--model tiny-timm --lock-image --lock-image-unlocked-groups 2 --feature-cache F": "lock all",
}


@pytest.mark.parametrize("words", REFUSED)
def test_models_that_cannot_be_trained_so(pairs, tmp_path, hf_model, begun, words):
    line = words.replace(" HF", f" {hf_model}").replace(" F", f" {tmp_path}/features")
    with pytest.raises(SystemExit) as stop:
        train(pairs, tmp_path, line.replace(" T", f" {begun}"))
    assert re.search(REFUSED[words], stop.value.code) and len(stop.value.code.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_not_of_the_locales_encoding(tmp_path, monkeypatch):
    """As any name but of ASCII is under LC_ALL=C."""
    monkeypatch.chdir(tmp_path)
    run = launcher.Run(plugin.Plugin())
    with replaced(*run.replacements()), open_clip_main.open("params.txt", "w") as file:
        file.write("name: \udcfc\n")  # Python's for the byte 0xfc
    assert Path("params.txt").read_bytes() == b"name: \xfc\n"


def test_the_second_scale_starts_where_it_is_told(pairs, tmp_path, caplog):
    still = "--loss otter --lr 0 --warmup 0 --epochs"
    path = train(pairs, tmp_path, f"{still} 1 --init-distill-logit-scale 2.5") / "epoch_1.pt"
    assert load(path)["otter"]["distill_logit_scale"] == 2.5
    # A resumed run goes on from where it was, whatever the flag says.
    path = train(pairs, tmp_path, f"{still} 2 --name b --resume {path}") / "epoch_2.pt"
    assert load(path)["otter"]["distill_logit_scale"] == 2.5
    assert "other settings" not in caplog.text


def test_loss_clip_is_stock(pairs, tmp_path, monkeypatch):
    """Every stock function is called with stock objects; the checkpoint has stock keys only."""
    seen, stock = {}, launcher._stock_train_one_epoch

    def record(model, data, loss, *rest, **kwargs):
        seen["model"], seen["loss"] = type(model), type(loss)
        seen["stages"] = data["train"].dataloader.pipeline[0].dataset.pipeline
        return stock(model, data, loss, *rest, **kwargs)

    monkeypatch.setattr(launcher, "_stock_train_one_epoch", record)
    path = train(pairs, tmp_path, "--epochs 1 --precision fp32") / "epoch_1.pt"
    assert seen["model"] is open_clip.CLIP and seen["loss"] is open_clip.ClipLoss
    assert not any("repeatable" in type(stage).__module__ for stage in seen["stages"])
    assert load(path)["optimizer"].keys() == {"state", "param_groups"}
    for name in ("parse_args", "create_loss", "get_data", "pt_load", "train_one_epoch"):
        assert "launcher" not in getattr(open_clip_main, name).__module__


def test_the_update_is_the_losss_gradient(pairs, tmp_path, monkeypatch):
    """One step of the command equals one step written out by hand, teacher and scale included."""
    batches, stock = [], launcher._stock_train_one_epoch

    def record(model, data, *rest, **kwargs):
        record.student = copy.deepcopy(model.module)
        model.module.register_forward_pre_hook(lambda _, inputs: batches.append(inputs))
        return stock(model, data, *rest, **kwargs)

    monkeypatch.setattr(launcher, "_stock_train_one_epoch", record)
    words = "--loss otter --model tiny-vit --alpha 0.3 --opt timm/momentum --momentum 0"
    words += " --wd 0 --lr 0.1 --epochs 1 --train-num-samples 12 --warmup 0"
    checkpoint = load(train(pairs, tmp_path, words) / "epoch_1.pt")

    student, (images, texts) = record.student.train(), batches[0]
    with torch.no_grad():
        targets = {f"dist_{k}": v for k, v in student(images, texts).items() if "features" in k}
    loss = OtterLoss(alpha=0.3)
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.1)
    before = copy.deepcopy(student.state_dict())
    sum(loss(**student(images, texts), **targets, output_dict=True).values()).backward()
    optimizer.step()
    found, near = checkpoint["state_dict"], {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(found, student.state_dict(), **near)
    scale = checkpoint["otter"]["distill_logit_scale"]
    torch.testing.assert_close(scale, loss.distill_logit_scale.detach())
    assert scale != 3.9
    decay = (1 + 2) / (10 + 2)
    average = {key: decay * before[key] + (1 - decay) * value for key, value in found.items()}
    torch.testing.assert_close(checkpoint["state_dict_ema"], average, **near)


def test_accumulation_is_the_whole_batch(pairs, tmp_path):
    """Two micro-batches of 6 move the weights as one batch of 12 does, both scales included."""
    words = "--loss otter --model tiny-vit --epochs 1 --train-num-samples 36 --lr 0.1"
    words += " --opt timm/momentum --momentum 0.9 --wd 0"
    one = train(pairs, tmp_path / "one", words)
    two = train(pairs, tmp_path / "two", words, "--batch-size 6 --accum-freq 2")
    one, two = load(one / "epoch_1.pt"), load(two / "epoch_1.pt")
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=1e-3, atol=1e-5)
    scales = [checkpoint["otter"]["distill_logit_scale"] for checkpoint in (one, two)]
    torch.testing.assert_close(*scales, rtol=1e-4, atol=0)
    assert scales[0] != 3.9


@pytest.mark.parametrize(
    "words",
    [
        "--precision amp_bf16 --model tiny-vit --grad-clip-norm 0.1",
        "--precision bf16 --model tiny-vit --grad-checkpointing --val-data VAL",
        "--lock-text --lock-text-freeze-layer-norm --force-custom-text --share-logit-scale",
        "--ot-scope local --keep-diag --local-loss --gather-with-grad --opt timm/lamb --eps 1e-6",
    ],
)
def test_works_with(pairs, tmp_path, words):
    words = words.replace("VAL", str(pairs / "00000.tar"))
    checkpoint = load(train(pairs, tmp_path, "--loss otter --epochs 1", words) / "epoch_1.pt")
    for state in (checkpoint["state_dict"], checkpoint["state_dict_ema"]):
        assert all(value.isfinite().all() for value in state.values())
    assert checkpoint["state_dict"].keys() == checkpoint["state_dict_ema"].keys()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torchcompile(pairs, tmp_path, monkeypatch, backend):
    """All that torch.compile does with our code; its own C++, which takes minutes, as a slow test."""
    backends = mock.Mock(side_effect=partial(torch.compile, backend=backend))
    monkeypatch.setattr(torch, "compile", backends)
    # Not Adam: it would blow up the rounding of gradients that are zero.
    words = "--opt timm/momentum --momentum 0.9 --wd 0 --model tiny-vit --train-num-samples 24"
    words += " --loss otter"
    path = train(pairs, tmp_path / "compiled", words, "--torchcompile") / "epoch_2.pt"
    assert backends.call_count == 2  # the student and the teacher
    compiled, plain = load(path), load(train(pairs, tmp_path / "plain", words) / "epoch_2.pt")
    torch.testing.assert_close(compiled["state_dict"], plain["state_dict"], rtol=1e-3, atol=1e-5)
    assert compiled["state_dict_ema"].keys() == plain["state_dict"].keys()


def test_what_is_logged(pairs, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(pairs, tmp_path, "--loss otter --epochs 1 --log-every-n-steps 2 --report-to tensorboard")
    log = (tmp_path / "run" / "out.log").read_text(encoding="utf-8")
    line = [line for line in log.splitlines() if "Train Epoch" in line][-1]
    values = {name: float(value) for name, value in re.findall(r"(\w+): ([\d.e+-]+) \(", line)}
    terms = values["Contrastive_loss"] + values["Distill_loss"]
    assert values["Loss"] == pytest.approx(terms, rel=1e-3)
    assert 1 <= values["Distill_scale"] <= 100
    assert 0 < values["Target_entropy"] < torch.tensor(12.0).log()
    assert 1 / 12 < values["Target_top_share"] <= 1
    assert 0 <= values["Marginal_error"] < 1
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {f"train/{name.lower()}" for name in values} <= set(events.Tags()["scalars"])
