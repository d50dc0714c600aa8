"""The command line: what is refused, before any data are read, and what the message says."""

import pytest
import torch

from otter_openclip.training import arguments, open_clip_v3


def parse(*words):
    from open_clip_train import params

    with arguments.parser_replaced(arguments.parse):
        return params.parse_args(list(words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss", "ottr"], "invalid choice: 'ottr'"),
        (["--loss", "otter", "--sinkhorn-lamda", "0.1"], "did you mean --sinkhorn-lambda?"),
        (["--loss", "otter", "--batchsize", "64"], "did you mean --batch-size?"),
        (["--loss", "otter", "--alpha", "1.5"], "--alpha: must be at least 0 and at most 1, got 1.5"),
        (["--loss", "otter", "--sinkhorn-lambda", "0"], "--sinkhorn-lambda: must be above 0, got 0"),
        (["--loss", "otter", "--sinkhorn-iter", "2.5"], "expected a whole number, got '2.5'"),
        (["--loss", "otter", "--ema-decay", "high"], "expected a number, got 'high'"),
        (["--loss", "otter", "--ot-scope", "node"], "invalid choice: 'node'"),
        (["--loss", "otter", "--siglip"], "drop --siglip"),
        (["--loss", "kd", "--model", "ViT-B-16-SigLIP"], "ViT-B-16-SigLIP: it has a logit bias"),
        (["--loss", "otter", "--model", "coca_ViT-B-32"], "CoCa model coca_ViT-B-32"),
        (["--loss", "kd", "--horovod"], "launch with torchrun"),
        (["--loss", "otter", "--torchscript"], "use --torchcompile"),
        (["--sinkhorn-lambda", "0.1"], "has no meaning with --loss clip; it needs --loss otter"),
        (["--loss", "ls", "--alpha", "0.3"], "it needs --loss kd or --loss otter"),
        (["--loss", "kd", "--keep-diag"], "--keep-diag has no meaning with --loss kd"),
        (["--loss", "ls", "--distill-model", "a", "--distill-pretrained", "b"], "has no teacher"),
        (["--loss", "kd", "--distill-model", "a"], "must be given together"),
        (
            ["--loss", "kd", "--distill-model", "a", "--distill-pretrained", "b", "--ema-decay", "0"],
            "drop one or the other",
        ),
    ],
)  # fmt: skip
def test_refused_before_anything_is_read(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        open_clip_v3.main(["--train-data", "/nowhere/{0..9}.tar", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("version", ["3.1.0", "2.32.0", "4.0.0", "4.1.0.dev0"])
def test_other_open_clip_releases_are_refused(version, monkeypatch):
    monkeypatch.setattr(open_clip_v3.open_clip, "__version__", version)
    with pytest.raises(SystemExit, match=f">=3.2,<4, found {version}; install a supported one"):
        open_clip_v3.main(["--loss", "otter"])


def test_defaults_are_the_papers():
    args = parse("--loss", "otter")
    assert arguments.settings(args) == {
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
        "teacher_mode": "train",
    }


def test_stock_flags_and_defaults_stay():
    from open_clip_train.params import parse_args

    words = [
        "--model",
        "ViT-B-32",
        "--train-data",
        "x",
        "--aug-cfg",
        "scale=(0.5,1.0)",
        "--warm",
        "7",
    ]
    stock, ours = vars(parse_args(words)), vars(parse(*words))
    assert ours["loss"] == "clip"
    assert {name: ours[name] for name in stock} == stock


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_float32_on_a_cpu_unless_asked():
    assert parse("--loss", "otter").precision == "fp32"
    assert parse("--loss", "otter", "--device", "cpu").precision == "fp32"
    assert parse("--loss", "otter", "--precision", "amp").precision == "amp"
    assert parse("--loss", "clip").precision == "amp"


def test_help_lists_both(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "--sinkhorn-iter" in out and "--grad-checkpointing" in out


def test_without_a_list_the_command_line_is_parsed(monkeypatch):
    """As open_clip_train's own ``parse_args(None)`` does."""
    monkeypatch.setattr("sys.argv", ["train", "--loss", "otter", "--alpha", "0.3"])
    from open_clip_train import params

    with arguments.parser_replaced(arguments.parse):
        assert params.parse_args(None).alpha == 0.3
