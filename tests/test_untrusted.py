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
from data_helpers import change_json, samples, write_tar
from training_helpers import flags, train

from otter_openclip import cli
from otter_openclip.untrusted import no_code_from_files


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


def planted_file(path, mark):
    contents = {"state_dict": {"a": torch.ones(1)}, "epoch": 1, "x": Planted(mark)}
    torch.save(contents, path)
    return str(path)


def test_no_caller_can_allow_code(mark, tmp_path):
    """timm 1.0.17 asks for ``weights_only=False``."""
    path = planted_file(tmp_path / "a.pt", mark)
    torch.load(path, weights_only=False)
    assert mark.exists()  # the plant works, or these tests would show nothing
    mark.unlink()
    with no_code_from_files():
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            torch.load(path, "cpu", weights_only=False)
        with pytest.raises((RuntimeError, TypeError)):  # of the stock one
            torch.load(path, "cpu", pickle, False)
        with pytest.raises((RuntimeError, pickle.UnpicklingError)):
            timm.models.load_state_dict(path)


def said(capsys, line, *errors):
    """What a command that must fail prints last; or how it ends, by one of the ``errors`` perhaps."""
    try:
        code = cli.main(list(map(str, line)))
        out = capsys.readouterr()
        message = (out.err + out.out).strip()
    except (SystemExit, *errors) as stop:
        code, message = 1, str(stop)
    assert code
    return message


@pytest.fixture
def tower(hf_model, tmp_path):
    source = open_clip.get_model_config(hf_model)["text_cfg"]["hf_model_name"]
    return shutil.copytree(source, tmp_path / "tower")


@pytest.fixture
def folder(hf_model, tower, tmp_path):
    """A model's folder as ``local-dir:`` takes it, with random weights."""
    path = shutil.copytree(tower, tmp_path / "model")
    change_json(path / "open_clip_config.json", model_cfg=open_clip.get_model_config(hf_model))
    torch.save(open_clip.create_model(hf_model).state_dict(), path / "open_clip_pytorch_model.bin")
    return path


@pytest.fixture
def towers_line(tower, tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "image.pt")
    line = ["towers", tmp_path / "out", "--image", "test_resnet", "--text", tower]
    return [*line, "--image-weights", tmp_path / "image.pt"]


def test_weights(mark, tmp_path, tower, folder, labelled, pairs, capsys, towers_line):
    bad, out = planted_file(tmp_path / "bad.pt", mark), tmp_path / "out"
    export = ["export", bad, out, "--model", "tiny-rn"]
    for line in (export, ["convert", bad, out], [*towers_line[:-1], bad]):
        assert f"{bad} cannot be read as a checkpoint" in said(capsys, line)
    resume = ["train", *flags(pairs, tmp_path / "logs", "--resume", bad)]
    for loss in ("otter", "clip"):
        assert f"{bad} cannot be read" in said(capsys, [*resume, "--loss", loss, "--name", loss])
    evaluate = line_of("eval", folder, tmp_path / "r.json", labelled, pairs)
    unread = "weights cannot be read: Weights only load failed"
    assert unread in said(capsys, [*evaluate, "--load_clfs", bad])
    shutil.copy(bad, folder / "open_clip_pytorch_model.bin")
    assert unread in said(capsys, evaluate)
    train_line = line_of("train", folder, tmp_path / "more", labelled, pairs)
    message = said(capsys, train_line)
    assert f"error: --model local-dir:{folder}: Weights only load failed" in message
    assert len(message.splitlines()) == 1
    (tower / "model.safetensors").unlink()
    shutil.copy(bad, tower / "pytorch_model.bin")
    assert str(tower) in said(capsys, towers_line)
    assert not out.exists()


def test_shards(mark, tmp_path, folder, labelled, pairs):
    """Pickles beside pictures: nothing uses them, in evaluation and training."""
    code = pickle.dumps(Planted(mark))
    data = shutil.copytree(labelled, tmp_path / "data")
    write_shard(labelled / "test" / "0.tar", data / "test" / "0.tar", code)
    # clip_benchmark's own loader
    (data / "dataset_type.txt").write_text("retrieval", encoding="utf-8")
    line = line_of("eval", folder, tmp_path / "r.json", data, pairs)
    assert cli.main([*line, "--task", "zeroshot_retrieval"]) == 0
    for name in ("00000.tar", "00001.tar"):
        write_shard(pairs / name, tmp_path / "pairs" / name, code)
    extra = ["--epochs", "1", "--workers", "0", "--train-num-samples", "12"]
    train(tmp_path / "pairs", tmp_path, "--loss", "infonce", *extra)


def write_shard(source, target, code):
    files = {}
    for key, parts in samples(source).items():
        parts = {"txt": b"a red circle", **parts, "pyd": code, "pickle": code}
        files |= {f"{key}.{name}": content for name, content in parts.items()}
    target.unlink(missing_ok=True)
    write_tar(target, files)


def plant_module(folder, mark, kind):
    """Make ``folder`` name Python code of its own for its tokenizer or model."""
    code = f"open({str(mark)!r}, 'w')\nclass Planted: pass\n"
    (folder / "planted.py").write_text(code, encoding="utf-8")
    if kind == "tokenizer":
        names = {"AutoTokenizer": [None, "planted.Planted"]}
        change_json(folder / "tokenizer_config.json", auto_map=names, tokenizer_class="Planted")
    else:
        names = {"AutoConfig": "planted.Planted", "AutoModel": "planted.Planted"}
        change_json(folder / "config.json", auto_map=names, model_type="planted")


def line_of(command, folder, out, labelled, pairs):
    evaluate = "--pretrained= --dataset wds/made --task zeroshot_classification --num_workers 0"
    words = {
        "eval": [*evaluate.split(), "--no_amp", "--dataset_root", labelled, "--output", out],
        "train": flags(pairs, out, "--loss", "otter"),
        "export": [folder / "open_clip_pytorch_model.bin", out],
    }
    return [command, *map(str, words[command]), "--model", f"local-dir:{folder}"]


@pytest.mark.parametrize("command", ["eval", "train", "export"])
def test_a_config_cannot_allow_code(mark, tmp_path, folder, labelled, pairs, command, capsys):
    """open_clip hands ``tokenizer_kwargs`` of a folder's config on to transformers."""
    plant_module(folder, mark, "tokenizer")
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    config["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    change_json(folder / "open_clip_config.json", model_cfg=config)
    line = line_of(command, folder, tmp_path / "out", labelled, pairs)
    message = said(capsys, line, *([ValueError] if command == "train" else []))
    assert "names Python code of its own, planted.py, which is never run" in message


@pytest.mark.parametrize("command", ["towers", "convert"])
def test_a_towers_code(mark, tmp_path, tower, towers_line, command, capsys, monkeypatch):
    """Even if the user says yes to transformers' question."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    plant_module(tower, mark, "model")
    line = towers_line
    if command == "convert":
        weights = {"image_encoder.model.fc.weight": torch.ones(4, 4)}
        weights["contrastive_loss.T"] = torch.ones(1)
        args = {"image_arch": "test_resnet", "text_arch": "a", "max_token_length": 8}
        torch.save({"state_dict": weights, "args": args}, tmp_path / "last.pth.tar")
        line = ["convert", tmp_path / "last.pth.tar", tmp_path / "out", "--text-model", tower]
    assert "which is never run" in said(capsys, line)
    assert not (tmp_path / "out").exists()


def test_nothing_outside_out(mark, tmp_path, tower, towers_line):
    """Names in a tokenizer's files are not paths to write to."""
    templates = [{"name": "default", "template": ""}, {"name": "../../stolen", "template": "x"}]
    change_json(tower / "tokenizer_config.json", chat_template=templates)
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "deep" / "out"
    code = cli.main([str(out if word == tmp_path / "out" else word) for word in towers_line])
    after = set(tmp_path.rglob("*")) - before - {tmp_path / "deep"}
    assert all(path.is_relative_to(out) for path in after)
    assert code == 0 or not after
