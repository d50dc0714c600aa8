"""Export: stock open_clip and clip_benchmark use the folder as it is."""

import io
import json
import os
import random
import subprocess
import sys
import tarfile

import numpy as np
import open_clip
import pytest
import torch
from conftest import MODELS, picture
from training_helpers import load, train

from otter_openclip import cli
from otter_openclip.checkpoints import export
from otter_openclip.checkpoints.export import export_checkpoint


@pytest.fixture(scope="module")
def run(pairs, tmp_path_factory):
    """A short OTTER run with model flags, the folder logs/run."""
    logs = tmp_path_factory.mktemp("logs")
    flags = [
        "--force-image-size",
        "24",
        "--force-context-length",
        "7",
        "--image-mean",
        "0.1",
        "0.2",
    ]
    flags += ["0.3", "--image-resize-mode", "squash", "--image-interpolation", "bilinear"]
    train(pairs, logs, "--loss", "otter", "--model", "tiny-vit", "--epochs", "1", *flags)
    return logs / "run"


def source_model(state):
    config = {**MODELS["tiny-vit"]}
    config["vision_cfg"] = config["vision_cfg"] | {"image_size": 24}
    config["text_cfg"] = config["text_cfg"] | {"context_length": 7}
    model = open_clip.CLIP(**config)
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_features_preprocessing_and_tokens_are_the_runs(run, tmp_path, weights):
    checkpoint = load(run / "checkpoints" / "epoch_1.pt")
    state = {
        "student": checkpoint["state_dict"],
        "teacher": checkpoint["optimizer"]["otter"]["teacher"],
    }[weights]
    out = export_checkpoint(run, tmp_path / "deep" / "out", weights=weights)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    images, texts = torch.randn(3, 3, 24, 24), tokenizer(["a red circle", "b", "c"])
    assert texts.shape == (3, 7)
    with torch.no_grad():
        for mine, its in zip(
            source_model(state)(images, texts), model.eval()(images, texts), strict=True
        ):
            assert torch.equal(mine, its)
    assert list(model.visual.preprocess_cfg["mean"]) == [0.1, 0.2, 0.3]
    assert model.visual.preprocess_cfg["interpolation"] == "bilinear"
    assert model.visual.preprocess_cfg["resize_mode"] == "squash"
    assert preprocess.transforms[0].size == (24, 24)
    student = checkpoint["state_dict"]["text_projection"]
    assert torch.equal(model.text_projection, student) == (weights == "student")


def test_stock_clip_benchmark_uses_the_folder_without_the_plugin(run, tmp_path):
    out = export_checkpoint(run, tmp_path / "out")
    data = tmp_path / "data"
    (data / "test").mkdir(parents=True)
    classes = ["red circle", "blue square", "green line"]
    (data / "classnames.txt").write_text("\n".join(classes))
    (data / "zeroshot_classification_templates.txt").write_text("{c}")
    (data / "dataset_type.txt").write_text("multilabel")
    (data / "test" / "nshards.txt").write_text("1")
    rng = random.Random(0)
    with tarfile.open(data / "test" / "0.tar", "w") as tar:
        for i in range(9):
            image, labels = io.BytesIO(), io.BytesIO()
            picture(rng, *classes[i % 3].split()).save(image, "PNG")
            np.save(labels, np.eye(3, dtype=np.uint8)[i % 3])
            for suffix, content in (("png", image), ("npy", labels)):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(content.getvalue())
                content.seek(0)
                tar.addfile(member, content)
    blocked = tmp_path / "blocked" / "otter_openclip"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('blocked')\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "clip_benchmark.cli", "eval", "--model", f"local-dir:{out}"),
            *("--pretrained", "", "--dataset", "wds/made", "--dataset_root", str(data)),
            *("--task", "zeroshot_classification", "--output", str(tmp_path / "result.json")),
            *("--num_workers", "0", "--no_amp"),
        ],
        env={**os.environ, "PYTHONPATH": str(blocked.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert 0 < metrics["mean_average_precision"] <= 1


def test_hugging_face_tower_with_its_tokenizer(pairs, tmp_path, hf_model):
    train(pairs, tmp_path, "--loss", "otter", "--model", hf_model, "--epochs", "1")
    out = export_checkpoint(tmp_path / "run", tmp_path / "out")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    tokens = tokenizer(["red circle"])
    assert tokens.tolist() == [[2, 5, 11, 3, 0, 0, 0, 0]]
    assert (out / "tokenizer.json").is_file()
    source = open_clip.create_model(
        hf_model, pretrained=str(tmp_path / "run" / "checkpoints" / "epoch_1.pt")
    )
    again = open_clip.create_model(f"local-dir:{out}")
    with torch.no_grad():
        features = [model.eval().encode_text(tokens) for model in (source, again)]
    assert torch.equal(*features)


def test_a_damaged_write_is_noticed(run, tmp_path, monkeypatch):
    stock = export.save_file

    def damage(tensors, *args, **kwargs):
        key = next(iter(tensors))
        stock(tensors | {key: tensors[key] + 1e-3}, *args, **kwargs)

    monkeypatch.setattr(export, "save_file", damage)
    with pytest.raises(RuntimeError, match="differs from the checkpoint in 1 tensors"):
        export_checkpoint(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_data_parallel_prefixes_and_safetensors(run, tmp_path):
    from safetensors.torch import save_file

    state = load(run / "checkpoints" / "epoch_1.pt")["state_dict"]
    flags = {"model": "tiny-vit", "force_image_size": [24], "force_context_length": 7}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "ddp.pt")
    save_file(state, tmp_path / "bare.safetensors")
    for name in ("ddp.pt", "bare.safetensors"):
        out = export_checkpoint(tmp_path / name, tmp_path / f"{name}-out", **flags)
        model = open_clip.create_model(f"local-dir:{out}")
        assert torch.equal(model.text_projection, state["text_projection"])


def test_push_hands_over_to_open_clip(run, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(export, "push_to_hf_hub", lambda *args: pushed.append(args))
    out = str(tmp_path / "out")
    assert cli.main(["export", str(run), out, "--push-to-hub", "lab/model"]) == 0
    ((model, _, config, repository),) = pushed
    assert repository == "lab/model" and config["vision_cfg"]["image_size"] == 24
    assert model.visual.image_size == (24, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/nothing.pt", "out"], "no checkpoint"),
        (["{run}", "{run}"], "exists; choose another folder or pass --overwrite"),
        (["{run}", "out", "--model", "tiny-vt"], "did you mean tiny-vit"),
        (["{run}", "out", "--model", "tiny-rn"], "does not fit the model tiny-rn"),
        (["{run}", "out", "--force-image-size", "64"], "visual.positional_embedding is"),
        (["{bare}", "out"], "pass --model"),
        (["{bare}", "out", "--model", "tiny-vit", "--weights", "teacher"], "has no EMA teacher"),
    ],
)
def test_errors_name_input_and_fix(run, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    torch.save(load(run / "checkpoints" / "epoch_1.pt")["state_dict"], tmp_path / "bare.pt")
    words = [a.format(run=run, bare=tmp_path / "bare.pt") for a in arguments]
    assert cli.main(["export", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_overwrite(run, tmp_path):
    out = tmp_path / "out"
    export_checkpoint(run, out)
    (out / "old").touch()
    export_checkpoint(run, out, overwrite=True, weights="teacher")
    assert not (out / "old").exists() and (out / export.WEIGHTS_FILE).is_file()
