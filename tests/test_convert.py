"""Conversion of checkpoints in the format of facebookresearch/OTTER."""

import json
import re
import shutil
from unittest import mock

import open_clip
import pytest
import timm
import torch
from conftest import text_folder
from torch import nn
from torch.nn import functional as F
from training_helpers import stock
from transformers import AutoConfig, AutoModel, BertConfig, RobertaConfig

from otter_openclip import cli
from otter_openclip.model_folders import convert
from otter_openclip.model_folders.convert import convert_checkpoint

WIDTH = 16  # of the text tower
ARGS = {"image_arch": "test_resnet", "text_arch": "declutr-sci-base", "max_token_length": 7}


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return text_folder(tmp_path_factory.mktemp("text-model"), width=WIDTH, pooler=True)


class Reference(nn.Module):
    """What the reference computes, under its checkpoint's names."""

    def __init__(self, tower, dim=WIDTH, bias=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.image_encoder, self.text_encoder = nn.Module(), nn.Module()
        self.contrastive_loss = nn.Module()
        self.image_encoder.model = timm.create_model("test_resnet", num_classes=dim)
        self.text_encoder.model = AutoModel.from_config(AutoConfig.from_pretrained(tower))
        self.text_encoder.fc = nn.Linear(WIDTH, dim) if dim != WIDTH else nn.Identity()
        if dim != WIDTH and not bias:
            nn.init.zeros_(self.text_encoder.fc.bias)
        self.contrastive_loss.loss = nn.Module()
        self.contrastive_loss.loss.T = nn.Parameter(torch.tensor(4.0 + seed / 10))
        for buffer in self.buffers():  # batch-norm statistics of a trained model
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer) / 4)
        self.eval()

    @torch.no_grad()
    def features(self, images, ids):
        mask = (ids != 0).long()
        hidden = self.text_encoder.model(input_ids=ids, attention_mask=mask)[0]
        hidden = self.text_encoder.fc(hidden) * mask[..., None]
        texts = hidden.sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(self.image_encoder.model(images), dim=-1), F.normalize(texts, dim=-1)


def save(path, state):
    optimizer = {"state": {}, "param_groups": []}
    torch.save({"epoch": 10, "state_dict": state, "optimizer": optimizer, "args": ARGS}, path)
    return path


def assert_converted(out, reference, dim=WIDTH):
    model, preprocess, tokenizer = stock(out)
    ids = tokenizer(["red circle", "a blue line", "green " * 20])
    assert ids.shape == (3, 7) and (ids[2] != 0).all()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        mine = model.encode_image(images, True), model.encode_text(ids, True)
    for got, wanted in zip(mine, reference.features(images, ids), strict=True):
        assert got.shape[1] == dim
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert model.logit_scale.item() == pytest.approx(reference.contrastive_loss.loss.T.item())
    assert preprocess.transforms[0].size in (224, (224, 224))


def test_a_distilled_run_of_old_releases_in_data_parallel(tower, tmp_path):
    """As torch 1.7 and transformers 4.3 had it: position_ids, and T without its loss module."""
    models = {"student": Reference(tower), "teacher": Reference(tower, seed=1)}
    state = {"module.dist_loss.T_s": torch.tensor(3.3)}
    for role, model in models.items():
        ids = {"text_encoder.model.embeddings.position_ids": torch.arange(12)[None]}
        for key, value in (model.state_dict() | ids).items():
            old = key.replace("image_encoder", "image_encoder.module").replace("loss.loss", "loss")
            state[f"module.{role}.{old}"] = value
    file = save(tmp_path / "last.pth.tar", state)
    for role, model in models.items():
        convert_checkpoint(file, tmp_path / role, text_model=str(tower), weights=role)
        assert_converted(tmp_path / role, model)


@pytest.mark.parametrize(
    ("kind", "dim", "bias"),
    [("BERT", 24, False), ("BERT", 12, True), ("BERT", 15, True), ("RoBERTa", 12, True)],
)
def test_projections(kind, dim, bias, tower, tmp_path, capsys):
    """One with a bias is exact where the text tower is at least as wide as the embedding."""
    if kind == "RoBERTa":
        config = BertConfig.from_pretrained(tower).to_dict() | {"num_hidden_layers": 11}
        config = RobertaConfig(**{k: v for k, v in config.items() if k != "model_type"})
        tower = shutil.copytree(tower, tmp_path / "roberta")
        config.save_pretrained(tower)
    reference = Reference(tower, dim=dim, bias=bias)
    file = save(tmp_path / "last.pth.tar", reference.state_dict())
    out = convert_checkpoint(file, tmp_path / "out", text_model=str(tower), report=print)
    assert_converted(out, reference, dim=dim)
    said = f"layer.{10 if kind == 'RoBERTa' else 0}.output.LayerNorm.bias: open_clip's"
    assert (said in capsys.readouterr().out) == bias


def test_the_command_and_its_folder(tower, tmp_path, capsys, monkeypatch):
    state = Reference(tower).state_dict()
    state["contrastive_loss.loss.T"] = torch.tensor(5.0)  # the forward limits exp of it to 100
    save(tmp_path / "last.pth.tar", state)
    monkeypatch.chdir(tmp_path)
    words = ["convert", "last.pth.tar", "out", "--text-model", str(tower)]
    assert cli.main(words) == 0
    assert "evaluate with --reference_crop" in capsys.readouterr().out
    assert cli.main(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text(encoding="utf-8"))
    assert config["preprocess_cfg"]["interpolation"] == "bicubic"
    assert config["model_cfg"]["text_cfg"]["hf_model_name"] == str(tmp_path / "out")
    model = open_clip.create_model("local-dir:out")
    assert model.logit_scale.exp().item() == pytest.approx(100)
    assert {p.name for p in tmp_path.iterdir()} == {"last.pth.tar", "out"}


def test_a_file_without_args_is_taken_for_the_defaults(tower, tmp_path, caplog, monkeypatch):
    reference = Reference(tower)
    torch.save({"state_dict": reference.state_dict()}, tmp_path / "OTTER.pth.tar")
    monkeypatch.setattr(convert, "DEFAULT_ARGS", ARGS)
    out = convert_checkpoint(tmp_path / "OTTER.pth.tar", tmp_path / "out", text_model=str(tower))
    assert "has no args; assuming the reference's defaults" in caplog.text
    config = json.loads((out / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    assert config["text_cfg"]["context_length"] == 7 and config["embed_dim"] == WIDTH


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 24}, "of its text tower cannot take it over"),
        ({"dim": 12, "add": {"text_encoder.fc.weight": torch.ones(12, WIDTH)}}, "of full rank"),
        ({"dim": 12, "drop": ".*output.LayerNorm.*"}, "needs a tower of BERT's kind"),
        ({"weights": "teacher"}, "has no teacher: only the reference's runs with --ema_distill"),
        ({"text_model": None}, "declutr-sci-base cannot be read"),
        ({"text_model": None, "text_arch": "gpt"}, "pass --text-model NAME_OR_DIR"),
        ({"image_arch": "resnet51"}, "Unknown model (resnet51)"),
        ({"image_arch": "resnet18"}, "does not fit resnet18 + "),
        ({"drop": "text_encoder.model.encoder.*"}, "Pass --text-model"),
        ({"drop": ".*image_encoder.*"}, "use otter-openclip export"),
        ({"drop": ".*fc.*"}, "has no fc head"),
        ({"drop": ".*[.]T"}, 'Missing key(s) in state_dict: "logit_scale"'),
        ({"add": {"momentum.w": torch.ones(1)}}, 'Unexpected key(s) in state_dict: "momentum.w"'),
    ],
)  # fmt: skip
def test_errors_name_input_and_fix(tower, tmp_path, capsys, monkeypatch, change, message):
    change = dict(change)
    flags = {"text_model": str(tower), "weights": "student"}
    flags |= {name: change.pop(name) for name in list(flags) if name in change}
    dim, drop, add = change.pop("dim", WIDTH), change.pop("drop", "-"), change.pop("add", {})
    state = Reference(tower, dim=dim, bias=True).state_dict()
    if flags["text_model"] is None:  # no network in tests
        offline = mock.Mock(side_effect=OSError("offline"))
        monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    left = {k: v for k, v in state.items() if not re.fullmatch(drop, k)}
    file = tmp_path / "last.pth.tar"
    torch.save({"state_dict": left | add, "args": ARGS | change}, file)
    words = ["convert", str(file), str(tmp_path / "out"), "--weights", flags["weights"]]
    if flags["text_model"]:
        words += ["--text-model", flags["text_model"]]
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"last.pth.tar"}
