"""The command line: what is refused, before any data are read, and what the message says."""

from argparse import Namespace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

import forks
import pytest
import torch
from open_clip_train import params
from training_helpers import parse_args as parse
from training_helpers import train

from otter_openclip import __version__, cli
from otter_openclip.training import flags as train_flags
from otter_openclip.training import launcher
from otter_openclip.training.objectives import create_loss

WRONG_LINES = {
    # Values beyond a bound.
    "--loss otter --alpha 1.5": "--alpha: must be at least 0 and at most 1, got 1.5",
    "--loss ls --label-smoothing -0.1": "--label-smoothing: must be at least 0 and at most 1",
    "--loss otter --sinkhorn-lambda 1e-40": "must be at least 0.001, got 1e-40",
    "--loss kd --distill-T-t 1e39": "at most 1e+06, got 1e39",
    "--loss otter --init-distill-logit-scale 4.7": "at most 4.60517, got 4.7",
    # A flag and the loss.
    "--loss ls --ema-decay 0.9": "it needs --loss clip or --loss kd or --loss otter",
    "--sinkhorn-lambda 0.1": "has no meaning with --loss clip; it needs --loss otter",
    # Flags that do not go together, or not alone.
    "--ema-decay 0.9 --opt timm/lookahead_adamw": "with --opt timm/lookahead_adamw",
    "--zeroshot-weights teacher": "--zeroshot-weights belongs to --zeroshot-data DIR",
    "--zeroshot-data SET --zeroshot-weights teacher": "(--loss clip) keeps no EMA; train with",
    "--loss kd --ema-decay 0 --zeroshot-data SET --zeroshot-weights teacher": "kd) keeps no EMA",
    "--loss ls --distill-model a --distill-pretrained b": "has no teacher",
    "--loss kd --distill-model a": "must be given together",
    "--loss kd --distill-model a --distill-pretrained b --ema-decay 0": "replaces; drop one",
    "--loss otter --init fit": "--init fit needs what towers give for all pairs",
    "--loss otter --init fit --feature-cache f --lock-image --image-mean 0 0 0": "drop --image-mean",
    "--loss otter --init fit --feature-cache f --lock-image --precision bf16": "take fp32, amp or",
    "--loss otter --pair-weights f --train-data t.csv": "takes --train-data in webdataset shards",
    "--loss clip --pair-weights f": "--pair-weights has no meaning with --loss clip",
    # What needs frozen towers, or all data beforehand.
    "--loss otter --feature-cache f": "none is: add --lock-image, --lock-text or both",
    "--loss otter --feature-dropout 0.5": "none is: add --lock-image, --lock-text or both",
    "--feature-cache f --lock-image --aug-cfg scale=(0.5,1.0)": "without augmentation; drop one",
    "--feature-cache f --lock-image --dataset-type synthetic": "otter-openclip data csv makes them",
    "--feature-cache f --lock-image --train-data t.csv": "otter-openclip data csv makes them",
    "--loss kd --feature-cache f --lock-image --distill-model RN50 --distill-pretrained x": (
        "does not go with --distill-model"
    ),
    # Misspellings and abbreviations.
    "--loss otterr": "did you mean otter?",
    "--loss otter --batchsize 64": "did you mean --batch-size?",
    "--loss otter --lock 3": "ambiguous option: --lock could match",
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_refused_before_anything_is_read(line, labelled, capsys):
    words = line.replace("SET", str(labelled)).split()
    with pytest.raises(SystemExit, match="2"):
        launcher.main(["--train-data", "/nowhere/{0..9}.tar", *words])
    assert WRONG_LINES[line] in capsys.readouterr().err


def test_defaults_are_the_papers():
    assert train_flags.settings(parse("--loss otter")) == {
        "loss": "otter",
        "alpha": 0.5,
        "ema_decay": 0.999,
        "sinkhorn_lambda": 0.15,
        "sinkhorn_iter": 5,
        "vv_coef": 1.0,
        "tt_coef": 1.0,
        "keep_diag": False,
        "ot_scope": "global",
        "share_logit_scale": False,
        "feature_dropout": 0.0,
        "pair_weights": None,
        "teacher_mode": "train",
    }


def test_stock_flags_and_defaults_stay():
    words = "--model ViT-B-32 --train-data x --aug-cfg scale=(0.5,1.0) --warm 7"
    stock, ours = vars(params.parse_args(words.split())), vars(parse(words))
    assert ours["loss"] == "clip"
    assert {name: ours[name] for name in stock} == stock


def test_who_goes_on_when_it_is_stopped():
    """``data inspect`` keeps nothing."""
    assert cli.COMMANDS["fit"].resumes and not cli.DATA_COMMANDS["inspect"].resumes


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_float32_on_a_cpu_unless_asked():
    assert parse("--loss otter").precision == "fp32"
    assert parse("--loss otter --device cpu").precision == "fp32"
    assert parse("--loss otter --precision amp").precision == "amp"
    assert parse("--loss clip").precision == "amp"


def test_without_a_list_the_command_line_is_parsed(monkeypatch):
    """As open_clip_train's own ``parse_args(None)`` does."""
    monkeypatch.setattr("sys.argv", ["train", "--loss", "otter", "--alpha", "0.3"])
    assert parse().alpha == 0.3


def test_version():
    done = forks.run("-m", "otter_openclip.train", "--version")
    assert done.returncode == 0 and done.stdout == f"otter-openclip {__version__}\n"


@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None)], ids=["nothing", "a folder"])
def test_a_logger_that_is_not_installed(pairs, tmp_path, monkeypatch, spec):
    """wandb makes a folder of its name where it runs."""
    look = "importlib.util.find_spec"
    monkeypatch.setattr(look, lambda name: spec if name == "wandb" else find_spec(name))
    for value in ("wandb", "all"):
        said = f"error: --report-to {value}: wandb is not installed; pip install wandb, or drop it"
        with pytest.raises(SystemExit, match=said):
            train(pairs, tmp_path, f"--report-to {value}")


def test_coefficients_are_the_losss_own_by_default():
    for loss, coef in (("kd", 0.0), ("otter", 1.0)):
        args = parse(f"--loss {loss}")
        made = create_loss(Namespace(**vars(args) | {"device": "cpu", "rank": 0, "world_size": 1}))
        assert made.vv_coef == made.tt_coef == coef
