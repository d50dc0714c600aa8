"""Recipes, ``--config``, the reference's towers and its transforms."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms import Resize
from training_helpers import load, train
from training_helpers import parse_args as parse
from transformers import AutoConfig, BertConfig, RobertaConfig

from otter_openclip.model_folders.convert import TEXT_TOWERS
from otter_openclip.model_folders.export import export_checkpoint
from otter_openclip.preprocessing import evaluation_transform, training_transform
from otter_openclip.training import plugin

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path):
    args = parse(f"--config {path} --train-data x.tar")
    assert args.loss == path.stem.split("_1gpu")[0].rsplit("_", 1)[1]
    assert args.model in open_clip.list_models() and args.model.startswith("otter-RN50-")
    assert (args.opt, args.momentum, args.lr, args.wd) == ("timm/momentum", 0.9, 6e-3, 0)
    assert args.warmup == 0 and args.epochs == 10 and args.lr_scheduler == "cosine"
    assert args.reference_crop and args.pretrained_image
    assert args.batch_size * (args.accum_freq if "1gpu" in path.stem else 8) == 512
    assert (args.image_interpolation == "bilinear") == ("yfcc" in path.stem)


def test_a_recipe_is_known_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert parse("--config cc3m_rn50_declutr_kd").loss == "kd"
    for name in ("cc3m_rn50_declutr_oter", "configs/cc3m_rn50_declutr_otter.yaml"):
        with pytest.raises(SystemExit):
            parse(f"--config {name}")
        error = capsys.readouterr().err
        assert f"--config {name} is neither a file nor a recipe of this package" in error
        assert "did you mean cc3m_rn50_declutr_otter?" in error
        assert all(path.stem in error for path in RECIPES)
    # A folder of that name does not hide it; a file of one's own goes first.
    Path("cc3m_rn50_declutr_otter").mkdir()
    assert parse("--config cc3m_rn50_declutr_otter").loss == "otter"
    Path("cc3m_rn50_declutr_kd").write_text("loss: ls", encoding="utf-8")
    assert parse("--config cc3m_rn50_declutr_kd").loss == "ls"


def test_every_setting_of_the_paper_has_a_recipe():
    names = {path.stem for path in RECIPES}
    assert {
        f"{data}_rn50_declutr_{loss}"
        for data in ("cc3m", "yfcc15m", "wit")
        for loss in ("infonce", "ls", "kd", "otter")
    } <= names
    towers = {parse(f"--config {path}").model for path in RECIPES}
    assert towers == {name for name in open_clip.list_models() if name.startswith("otter-RN50-")}


def test_flags_win_over_the_recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    lines = "loss: otter\nsinkhorn_lambda: 0.3\nlr: 1e-3\nforce-image-size: [32, 32]\n"
    file.write_text(f"{lines}local-loss: true\nreference-crop: true\n", encoding="utf-8")
    # Abbreviated, as argparse has it.
    args = parse("--lr", "0.5", f"--conf={file}", "--no-local-loss")
    assert (args.loss, args.sinkhorn_lambda, args.lr) == ("otter", 0.3, 0.5)
    assert not args.local_loss and args.reference_crop
    assert args.force_image_size == [32, 32] and args.config == str(file)


def test_values_are_what_is_written(tmp_path):
    """Not what YAML 1.1 makes of them: 8, a day, false and a number."""
    file = tmp_path / "recipe.yaml"
    text = "warmup: 010\nname: 2026-11-30\nreport-to: no\nwandb-notes: 1.10\npretrained: ''\n"
    file.write_text(text + "aug-cfg: {scale: [0.9, 1.0], use_timm: false}\n", encoding="utf-8")
    args = parse("--config", str(file))
    assert (args.warmup, args.name, args.report_to) == (10, "2026-11-30", "no")
    assert (args.wandb_notes, args.pretrained) == ("1.10", "")
    assert args.aug_cfg == {"scale": [0.9, 1.0], "use_timm": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sinkhorn-lamda: 0.1", "unknown key 'sinkhorn-lamda'; did you mean sinkhorn-lambda?"),
        ("loss: otter\nsinkhorn-lambda: 0", "--sinkhorn-lambda: must be at least 0.001, got 0"),
        ("local-loss: 1", "local-loss is a switch: true or false, got 1"),
        ("lr: [1, 2]", "lr takes one value"),
        ("lr: true", "--lr: invalid float value: 'true'"),
        ("lr: 1e-3\nlr: 1e-4", "line 2 has 'lr' again; drop one"),
        ("weight-decay: 0\nlr: 1\nweight_decay: 1", "line 3 has 'weight_decay' again"),
        ("force-image-size: [32, null]", "--force-image-size: invalid int value: 'null'"),
        ("warmup: 1:30", "--warmup: invalid int value: '1:30'"),
        ("local-loss: yes", "local-loss is a switch: true or false, got yes"),
        ("config: other.yaml", "unknown key 'config'"),
        ("- lr", "must hold lines 'flag: value', got list"),
        ("lr: [1", "cannot be read"),
        (None, "cannot be read"),
        ("reference-crop: true\naug-cfg: {scale: 1}", "drop it, or --aug-cfg"),
        ("reference-crop: true\nimage-resize-mode: squash", "drop it, or --aug-cfg"),
    ],
)  # fmt: skip
def test_bad_recipes_are_refused(tmp_path, capsys, text, message):
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        parse("--config", str(file))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_towers_build_with_random_weights(monkeypatch):
    def config(name, **_):
        roberta = name.startswith("johngiorgi/declutr-") and not name.endswith("sci-base")
        sizes = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 16}
        sizes |= {"hidden_size": 1024 if "large" in name else 768, "intermediate_size": 32}
        return (RobertaConfig if roberta else BertConfig)(**sizes)

    monkeypatch.setattr(AutoConfig, "from_pretrained", config)
    names = [name for name in open_clip.list_models() if name.startswith("otter-RN50-")]
    towers = [open_clip.get_model_config(name)["text_cfg"]["hf_model_name"] for name in names]
    assert sorted(towers) == sorted(TEXT_TOWERS.values())
    for name in names:
        assert open_clip.get_model_config(name)["text_cfg"]["context_length"] == 60
    for name in (names[0], next(name for name in names if "large" in name)):
        model = open_clip.create_model(name, pretrained_text=False).eval()
        assert model.logit_scale.item() == pytest.approx(3.9)
        head = model.visual.trunk.fc
        assert head.weight.shape == (768, 2048) and head.bias.shape == (768,)
        assert type(model.text.pooler).__name__ == "MeanPooler"
        assert isinstance(model.text.proj, torch.nn.Linear) == ("large" in name)
        with torch.no_grad():
            assert model.encode_text(torch.arange(2, 10)[None]).shape == (1, 768)
            assert model.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 768)


@pytest.mark.parametrize("name", ["otter-RN18-trial", "otter-tiny-trial"])
def test_trial_towers_build(name):
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    image = preprocess(Image.new("RGB", (80, 70)))[None]
    with torch.no_grad():
        images = model.eval().encode_image(image)
        texts = model.encode_text(open_clip.get_tokenizer(name)(["a circle"]))
    assert images.shape == texts.shape and model.visual.trunk.fc.bias is not None


def test_transforms_resize_to_256_and_crop_224():
    noise = np.random.default_rng(0).integers(0, 255, (256, 300, 3), np.uint8)
    picture = Image.fromarray(noise)
    centre = evaluation_transform(mean=(0, 0, 0), std=(1, 1, 1))(picture)
    expected = torch.from_numpy(noise[16:240, 38:262] / np.float32(255))
    assert torch.equal(centre, expected.permute(2, 0, 1))
    torch.manual_seed(0)
    crops = [training_transform(mean=(0, 0, 0), std=(1, 1, 1))(picture) for _ in range(3)]
    assert all(crop.shape == (3, 224, 224) for crop in crops)
    assert not torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], centre)
    assert training_transform(64)(Image.new("L", (500, 90))).shape == (3, 64, 64)


def test_training_from_a_recipe_and_export(pairs, tmp_path, monkeypatch):
    """With the reference's transforms: YFCC trains with bilinear resizing, evaluation is bicubic."""
    pictures, resizing, stock = [], [], plugin.reference_transforms

    def counting(config):
        training, evaluation = stock(config)
        steps = [*training.transforms, *evaluation.transforms]
        resizing.extend(x.interpolation.value for x in steps if isinstance(x, Resize))
        return (lambda image: pictures.append(image.size) or training(image)), evaluation

    monkeypatch.setattr(plugin, "reference_transforms", counting)
    recipe = "loss: otter\nreference-crop: true\nepochs: 5\nimage-interpolation: bilinear"
    (tmp_path / "r.yaml").write_text(recipe, encoding="utf-8")
    folder = train(pairs, tmp_path, f"--config {tmp_path}/r.yaml --epochs 1", csv=True)
    assert load(folder / "epoch_1.pt")["otter"]["settings"]["loss"] == "otter"
    assert not (folder / "epoch_2.pt").exists() and pictures == 72 * [(40, 40)]
    assert resizing == ["bilinear", "bicubic"]
    out = export_checkpoint(tmp_path / "run", tmp_path / "out")
    written = json.loads((out / "open_clip_config.json").read_text(encoding="utf-8"))
    assert written["preprocess_cfg"]["interpolation"] == "bilinear"
    assert "| `reference_crop` | True |" in (out / "README.md").read_text(encoding="utf-8")
