"""Planted files: no command runs their code, follows them to the network or writes outside OUT."""

import json
import pickle
import shutil
import socket
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from data_helpers import samples, write_tar
from training_helpers import flags, train

from otter_openclip import cli
from otter_openclip.untrusted import no_code_from_files

EVAL = ["--pretrained", "", "--dataset", "wds/made", "--task", "zeroshot_classification"]
EVAL += ["--num_workers", "0", "--batch_size", "8", "--no_amp"]


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A file that only planted code makes, and a network that nobody asks."""
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a) or 1 / 0)
    monkeypatch.setattr(socket.socket, "connect", lambda *a: asked.append(a) or 1 / 0)
    # As torch before 2.6 is, and as a user may have set it.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "planted-code-ran"
    yield path
    assert not path.exists()
    assert not asked


class Planted:
    """Runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def planted_file(path, mark, **contents):
    torch.save(
        {"state_dict": {"a": torch.ones(1)}, "epoch": 1, **contents, "x": Planted(mark)}, path
    )
    return str(path)


def test_the_plant_works(tmp_path):
    """Or the tests below would show nothing."""
    mark = tmp_path / "ran"
    torch.load(planted_file(tmp_path / "a.pt", mark), weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("keywords", [{}, {"weights_only": False}, {"weights_only": None}])
def test_no_caller_can_allow_code(mark, tmp_path, keywords):
    """timm 1.0.17 asks for ``weights_only=False``."""
    path = planted_file(tmp_path / "a.pt", mark)
    with no_code_from_files():
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            torch.load(path, "cpu", **keywords)
        with pytest.raises((RuntimeError, TypeError)):  # of the stock one
            torch.load(path, "cpu", pickle, False)
        with pytest.raises((RuntimeError, pickle.UnpicklingError)):
            timm.models.load_state_dict(path)


def said(capsys, line):
    """What a command that must fail prints last."""
    try:
        code = cli.main(list(map(str, line)))
        out = capsys.readouterr()
        message = (out.err + out.out).strip()
    except SystemExit as stop:
        code, message = 1, str(stop)
    assert code
    return message


@pytest.fixture
def folder(hf_model, tmp_path):
    """A model's folder as ``local-dir:`` takes it, with random weights."""
    path = tmp_path / "model"
    path.mkdir()
    config = open_clip.get_model_config(hf_model)
    shutil.copytree(config["text_cfg"]["hf_model_name"], path, dirs_exist_ok=True)
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(open_clip.create_model(hf_model).state_dict(), path / "open_clip_pytorch_model.bin")
    return path


def test_weights(mark, tmp_path, folder, labelled, pairs, capsys, hf_model):
    """Every command that is given a file of weights."""
    tower = open_clip.get_model_config(hf_model)["text_cfg"]["hf_model_name"]
    bad = planted_file(tmp_path / "bad.pt", mark)
    out = tmp_path / "out"
    towers = ["towers", out, "--image", "test_resnet", "--text", tower]
    towers_line = [*towers, "--image-weights", bad]
    for line in (["export", bad, out, "--model", "tiny-rn"], ["convert", bad, out], towers_line):
        assert f"{bad} cannot be read as a checkpoint" in said(capsys, line)
    assert f"{bad} cannot be read" in said(
        capsys, ["train", *flags(pairs, tmp_path / "logs", "--loss", "otter", "--resume", bad)]
    )
    clip = ["train", *flags(pairs, tmp_path / "clip", "--loss", "clip", "--resume", bad)]
    assert f"{bad} cannot be read" in said(capsys, clip)
    shutil.copy(bad, folder / "open_clip_pytorch_model.bin")
    line = ["eval", "--model", f"local-dir:{folder}", *EVAL, "--dataset_root", labelled]
    message = said(capsys, [*line, "--output", tmp_path / "r.json"])
    assert "weights cannot be read: Weights only load failed" in message
    assert not out.exists()


def test_saved_classifiers(mark, tmp_path, folder, labelled, capsys):
    bad = planted_file(tmp_path / "bad.pt", mark)
    line = ["eval", "--model", f"local-dir:{folder}", *EVAL, "--dataset_root", labelled]
    message = said(capsys, [*line, "--output", tmp_path / "r.json", "--load_clfs", bad])
    assert "weights cannot be read: Weights only load failed" in message


def test_the_text_towers_folder(mark, tmp_path, hf_model, capsys):
    text = tmp_path / "text"
    shutil.copytree(open_clip.get_model_config(hf_model)["text_cfg"]["hf_model_name"], text)
    (text / "model.safetensors").unlink()
    planted_file(text / "pytorch_model.bin", mark)
    line = ["towers", tmp_path / "out", "--image", "test_resnet", "--text", text]
    weights = tmp_path / "image.pt"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    assert str(text) in said(capsys, [*line, "--image-weights", weights])
    assert not (tmp_path / "out").exists()


def test_shards(mark, tmp_path, folder, labelled, pairs):
    """Pickles beside pictures: nothing uses them, in evaluation and training."""
    code = pickle.dumps(Planted(mark))
    shutil.copytree(labelled, tmp_path / "data")
    write_shard(labelled / "test" / "0.tar", tmp_path / "data" / "test" / "0.tar", code)
    (tmp_path / "data" / "dataset_type.txt").write_text("retrieval")  # clip_benchmark's own loader
    line = ["eval", "--model", f"local-dir:{folder}", *EVAL, "--dataset_root", tmp_path / "data"]
    line[line.index("zeroshot_classification")] = "zeroshot_retrieval"
    assert cli.main([*map(str, line), "--output", str(tmp_path / "r.json")]) == 0
    write_shard(pairs / "00000.tar", tmp_path / "pairs" / "00000.tar", code)
    write_shard(pairs / "00000.tar", tmp_path / "pairs" / "00001.tar", code)
    extra = ["--epochs", "1", "--workers", "0", "--train-num-samples", "12"]
    train(tmp_path / "pairs", tmp_path, "--loss", "infonce", *extra)


def write_shard(source, target, code):
    files = {}
    for key, parts in samples(source).items():
        files |= {f"{key}.{name}": content for name, content in parts.items()}
        files |= {f"{key}.txt": parts.get("txt", b"a red circle")}
        files |= {f"{key}.pyd": code, f"{key}.pickle": code}
    target.unlink(missing_ok=True)
    write_tar(target, files)


def plant_module(folder, mark, kind):
    """Make ``folder`` name Python code of its own for its tokenizer or model."""
    (folder / "planted.py").write_text(f"open({str(mark)!r}, 'w')\nclass Planted: pass\n")
    if kind == "tokenizer":
        path = folder / "tokenizer_config.json"
        change = {"auto_map": {"AutoTokenizer": [None, "planted.Planted"]}}
        change["tokenizer_class"] = "Planted"
    else:
        path = folder / "config.json"
        change = {"auto_map": {"AutoConfig": "planted.Planted", "AutoModel": "planted.Planted"}}
        change["model_type"] = "planted"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def line_of(command, folder, out, labelled, pairs):
    model = f"local-dir:{folder}"
    lines = {
        "eval": ["eval", "--model", model, *EVAL, "--dataset_root", labelled, "--output", out],
        "train": ["train", *flags(pairs, out, "--loss", "otter", "--model", model)],
        "export": ["export", folder / "open_clip_pytorch_model.bin", out, "--model", model],
    }
    return [str(word) for word in lines[command]]


@pytest.mark.parametrize("command", ["eval", "train", "export"])
def test_a_config_cannot_allow_code(mark, tmp_path, folder, labelled, pairs, command, capsys):
    """open_clip hands ``tokenizer_kwargs`` of a folder's config on to transformers."""
    plant_module(folder, mark, "tokenizer")
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    path.write_text(json.dumps(config))
    line = line_of(command, folder, tmp_path / "out", labelled, pairs)
    try:
        message = said(capsys, line)
    except ValueError as error:
        message = str(error)
    assert "names Python code of its own, planted.py, which is never run" in message


@pytest.mark.parametrize("command", ["towers", "convert"])
def test_a_towers_code(mark, tmp_path, hf_model, command, capsys, monkeypatch):
    """Even if the user says yes to transformers' question."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    text = tmp_path / "text"
    shutil.copytree(open_clip.get_model_config(hf_model)["text_cfg"]["hf_model_name"], text)
    plant_module(text, mark, "model")
    line = ["towers", tmp_path / "out", "--image", "test_resnet", "--text", text]
    if command == "convert":
        weights = {"image_encoder.model.fc.weight": torch.ones(4, 4)}
        weights["contrastive_loss.T"] = torch.ones(1)
        args = {"image_arch": "test_resnet", "text_arch": "a", "max_token_length": 8}
        torch.save({"state_dict": weights, "args": args}, tmp_path / "last.pth.tar")
        line = ["convert", tmp_path / "last.pth.tar", tmp_path / "out", "--text-model", text]
    assert "which is never run" in said(capsys, line)
    assert not (tmp_path / "out").exists()


NOWHERE = "nobody/nothing"


@pytest.mark.parametrize(
    ("command", "part", "values"),
    [
        ("eval", "text_cfg", {"hf_model_name": NOWHERE, "hf_tokenizer_name": NOWHERE}),
        ("train", "text_cfg", {"hf_model_pretrained": True, "hf_model_name": NOWHERE}),
        ("export", "vision_cfg", {"timm_model_name": f"hf-hub:{NOWHERE}"}),
        (
            "eval",
            "vision_cfg",
            {"timm_model_name": "legacy_seresnet18", "timm_model_pretrained": True},
        ),
        (
            "train",
            "vision_cfg",
            {"timm_model_name": "legacy_seresnet18", "timm_model_pretrained": True},
        ),
    ],
)
def test_offline_means_offline(mark, tmp_path, folder, labelled, pairs, command, part, values):
    """A config cannot lead anywhere (HF_HUB_OFFLINE is set in all tests)."""
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"][part] |= values
    path.write_text(json.dumps(config))
    with pytest.raises(Exception, match=r".") as failed:  # of each library its own
        assert cli.main(line_of(command, folder, tmp_path / "out", labelled, pairs)) == 0
    assert not isinstance(failed.value, ZeroDivisionError)


def test_nothing_outside_out(mark, tmp_path, hf_model, capsys):
    """Names in a tokenizer's files are not paths to write to."""
    text = tmp_path / "text"
    shutil.copytree(open_clip.get_model_config(hf_model)["text_cfg"]["hf_model_name"], text)
    path = text / "tokenizer_config.json"
    templates = [{"name": "default", "template": ""}, {"name": "../../stolen", "template": "x"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "image.pt")
    before = {path for path in tmp_path.rglob("*")}
    line = ["towers", tmp_path / "deep" / "out", "--image", "test_resnet", "--text", text]
    code = cli.main([*map(str, line), "--image-weights", str(tmp_path / "image.pt")])
    after = {path for path in tmp_path.rglob("*")} - before - {tmp_path / "deep"}
    assert all(path.is_relative_to(tmp_path / "deep" / "out") for path in after)
    assert code == 0 or not after
