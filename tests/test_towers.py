"""Two pretrained towers in one folder: tiny ones made here, and nothing from the network."""

from __future__ import annotations

import argparse
import json
import shutil
import socket

import pytest
import timm
import torch
from conftest import text_folder
from data_helpers import change_json
from safetensors.torch import save_file
from training_helpers import load, stock, train
from transformers import AutoModel, M2M100Config, M2M100Model

from otter_openclip import cli
from otter_openclip.model_folders.assembly import read_trunk
from otter_openclip.model_folders.export import export_checkpoint
from otter_openclip.model_folders.modules import follow_modules
from otter_openclip.model_folders.towers import make_towers


def image_tower(name):
    """A timm tower whose batch norm has statistics that are not the initial ones."""
    torch.manual_seed(1)
    tower = timm.create_model(name)
    for key, value in tower.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 2)
    return tower.eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with ``text`` and, per image tower, its weights as NAME.pt."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(2)
    text_folder(folder / "text", width=64, layers=2, pooler=True)
    for name in ("test_resnet", "test_vit", "test_efficientnet"):
        torch.save(image_tower(name).state_dict(), folder / f"{name}.pt")
    return folder


def make(parts, out, image="test_resnet", **settings):
    files = {"image_weights": parts / f"{image}.pt", "text": parts / "text"}
    return make_towers(out, image=image, **files | settings)


@torch.no_grad()
def pooled_text(folder, tokens, pooler):
    output = AutoModel.from_pretrained(folder).eval()(tokens, attention_mask=(tokens != 0).long())
    if pooler == "own":
        return output.pooler_output
    if pooler == "cls":
        return output.last_hidden_state[:, 0]
    mask = (tokens != 0)[..., None]
    return (output.last_hidden_state * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize(
    ("image", "pooler", "heads", "dim"),
    [
        ("test_resnet", "mean", ("linear", "linear"), None),
        ("test_efficientnet", "cls", ("mlp", "mlp"), 32),
        ("test_vit", "own", ("linear", "linear"), None),  # both heads are the identity
    ],
)
def test_features_are_the_parts_own_through_the_heads(parts, tmp_path, image, pooler, heads, dim):
    settings = {"image_head": heads[0], "text_head": heads[1], "embed_dim": dim}
    out = make(parts, tmp_path / "out", image, text_pooler=pooler, **settings)
    model, _, tokenizer = stock(out)
    tower, tokens = image_tower(image), tokenizer(["a red circle", "square"])
    tower.reset_classifier(0)
    images = torch.randn(2, 3, *tower.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        pooled = tower(images), pooled_text(parts / "text", tokens, pooler)
        found = model.encode_image(images), model.encode_text(tokens)
        modules = model.visual.head, model.text.proj
        for expected, got, module, head in zip(pooled, found, modules, heads, strict=True):
            identity = head == "linear" and expected.shape[1] == (dim or 64)
            assert got.shape == (2, dim or 64)
            expected = expected if identity else module(expected)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert model.logit_scale.item() == pytest.approx(3.9)


def test_preprocessing_is_the_towers_unless_given(parts, tmp_path):
    image = "test_efficientnet"
    made = [stock(make(parts, tmp_path / f"{n}", image, seed=n // 2)) for n in range(3)]
    heads = [model.visual.head.proj.weight for model, *_ in made]
    assert torch.equal(*heads[:2]) and not torch.equal(*heads[1:])
    model, preprocess, tokenizer = made[0]
    config = timm.get_pretrained_cfg(image)
    got = model.visual.preprocess_cfg
    assert (tuple(got["mean"]), tuple(got["std"])) == (config.mean, config.std)
    assert got["interpolation"] == config.interpolation and got["resize_mode"] == "shortest"
    assert preprocess.transforms[0].size == config.input_size[1]
    assert tokenizer(["red"]).shape == (1, 12)  # no more positions than the text tower has

    words = f"towers {tmp_path}/given --image hf-hub:timm/test_efficientnet --text {parts}/text "
    words += f"--image-weights {parts}/test_efficientnet.pt --image-size 48 --context-length 6 "
    words += "--image-mean .1 .2 .3 --image-std .4 .5 .6 --image-interpolation bilinear "
    words += "--init-logit-scale 2 --embed-dim 32"
    assert cli.main(words.split()) == 0
    model, preprocess, tokenizer = stock(tmp_path / "given")
    got = model.visual.preprocess_cfg
    assert (got["mean"], got["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert got["interpolation"] == "bilinear" and model.visual.image_size == (48, 48)
    assert tokenizer(["red"]).shape == (1, 6) and model.logit_scale.item() == 2
    assert model.encode_text(tokenizer(["red"])).shape == (1, 32)


def modules(folder, *kinds, start="", **pooling):
    """Make a folder's tower one of sentence-transformers, with further modules behind."""
    (folder / "1_Pooling").mkdir(parents=True)
    paths = [start, *(f"{n}_{kind}" for n, kind in enumerate(kinds[1:], 1))]
    listed = [{"path": p, "type": f"a.{kind}"} for p, kind in zip(paths, kinds, strict=True)]
    (folder / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    return folder


CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
KINDS = ("Transformer", "Pooling")


def test_a_folders_own_pooling_is_the_default(parts, tmp_path):
    """Named in newer folders; older ones have switches, and the transformer in a folder of its own."""
    text = shutil.copytree(parts / "text", tmp_path / "text")
    modules(text, *KINDS, "Normalize", pooling_mode="cls", embedding_dimension=64)
    model, _, tokenizer = stock(make(parts, tmp_path / "out", text=text))
    tokens = tokenizer(["a red circle", "square"])
    torch.testing.assert_close(model.encode_text(tokens), pooled_text(text, tokens, "cls"))
    switches = {"pooling_mode_mean_tokens": True, "include_prompt": True}
    old = modules(tmp_path / "old", *KINDS, "Normalize", start="0_Transformer", **switches)
    shutil.copytree(parts / "text", old / "0_Transformer")
    model, _, _ = stock(make(parts, tmp_path / "from-old", text=old))
    torch.testing.assert_close(model.encode_text(tokens), pooled_text(text, tokens, "mean"))


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        ((*KINDS, "Dense", "Normalize"), CLS, "of Transformer, Pooling, Dense, pooling by cls;"),
        (KINDS, {"pooling_mode_max_tokens": True}, "pooling by pooling_mode_max_tokens"),
        (KINDS, CLS | {"pooling_mode_mean_tokens": True}, "pooling by cls and mean"),
        (("Transformer",), {}, "consists of Transformer, pooling by nothing"),
    ],
)
def test_modules_that_open_clip_cannot_express(tmp_path, kinds, pooling, message):
    text = modules(tmp_path, *kinds, **pooling)
    with pytest.raises(ValueError, match=message):
        follow_modules(str(text), None)
    assert follow_modules(str(text), "mean") == (str(text), "mean")
    for broken in ("[{}]", "[]", "{"):
        (text / "modules.json").write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match=r"the modules.json of .* or a file it names is bro"):
            follow_modules(str(text), None)


def test_a_towers_own_prompt_cannot_be_expressed(parts, tmp_path):
    text = modules(shutil.copytree(parts / "text", tmp_path / "text"), *KINDS, **CLS)
    path = text / "config_sentence_transformers.json"
    change_json(path, prompts={"query": "a photo: "}, default_prompt_name="query")
    with pytest.raises(ValueError, match="a prompt before each text, pooling by cls; open_clip"):
        make(parts, tmp_path / "out", text=text)
    change_json(path, default_prompt_name=None)
    assert make(parts, tmp_path / "out", text=text)


def test_features_that_are_not_the_towers_are_refused(parts, tmp_path):
    """open_clip takes the first token, which is padding where a tokenizer pads on the left."""
    text = shutil.copytree(parts / "text", tmp_path / "text")
    change_json(text / "tokenizer_config.json", padding_side="left")
    with pytest.raises(ValueError, match=r"pads, masks or pools texts in another way than .*text"):
        make(parts, tmp_path / "out", text=text, text_pooler="cls")


def test_image_weights_as_others_save_them(tmp_path, caplog):
    state = image_tower("test_vit").state_dict()
    other = {key: value + 1 for key, value in state.items()}
    optimizer = {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}
    torch.serialization.clear_safe_globals()  # timm, too, takes some off after a load
    trained = {"optimizer": optimizer, "args": argparse.Namespace(arch="test_vit", lr=0.1)}
    mae = {"mask_token": torch.ones(1, 1, 64), "decoder_blocks.0.weight": torch.ones(2)}

    def behind(prefix, tensors=state):
        return {f"{prefix}{key}": value for key, value in tensors.items()}

    files = {
        "dino": {
            "student": behind("module.backbone.", other) | {"module.head.weight": torch.ones(2)},
            "teacher": behind("backbone.") | {"head.mlp.0.weight": torch.ones(2)},
            "dino_loss": {"center": torch.ones(2)},
        },
        "mae": {"model": state | mae},
        "torchvision": {"model": state, "model_ema": behind("module.", other)},
        "lightning": {"state_dict": behind("model.net."), "hyper_parameters": {"lr": 0.1}},
        "moco": behind("encoder_k.", other) | behind("encoder_q."),
        "of its own": {"weights": behind("module."), "epoch": 3},
    }
    for name, contents in files.items():
        torch.save(contents | trained, tmp_path / name)
        for key, value in read_trunk("test_vit", tmp_path / name).state_dict().items():
            assert torch.equal(value, state[key]), (name, key)
    assert "dino holds student, teacher, dino_loss: teacher is taken" in caplog.text
    assert "torchvision holds model, model_ema: model is taken" in caplog.text
    assert "there as encoder_q.* and encoder_k.*: encoder_q.* is taken" in caplog.text


def renamed(state):
    return {f"part_{i}.{key.split('.')[-1]}": value for i, (key, value) in enumerate(state.items())}


def test_image_weights_are_matched_by_name_then_by_order_and_shape(tmp_path):
    state = image_tower("test_resnet").state_dict()
    trunk = {key: value for key, value in state.items() if not key.startswith("fc.")}
    uncounted = {key: v for key, v in trunk.items() if not key.endswith("num_batches_tracked")}
    files = {
        "named.safetensors": dict(reversed(state.items())),
        "other-classes.pt": trunk | {"fc.weight": torch.ones(3, 96), "fc.bias": torch.ones(3)},
        "old.pt": uncounted,
        "renamed.pt": renamed(state),
        "renamed-trunk.pth": renamed(trunk),
        "renamed-old.pt": renamed(uncounted),
        "half.pt": {key: v.half() if v.is_floating_point() else v for key, v in state.items()},
    }
    for name, contents in files.items():
        (save_file if name.endswith("safetensors") else torch.save)(contents, tmp_path / name)
        got = read_trunk("test_resnet", tmp_path / name).state_dict()
        assert got.keys() == trunk.keys()
        for key, value in trunk.items():
            if "old" not in name or key in uncounted:
                tolerance = 1e-3 if name == "half.pt" else 0
                torch.testing.assert_close(got[key], value, rtol=tolerance, atol=tolerance)


def test_weights_that_do_not_fit_are_named(parts, tmp_path):
    state = image_tower("test_resnet").state_dict()
    names = list(state)
    swapped = {name: state[name] for name in (names[0], names[2], names[1], *names[3:])}
    text = AutoModel.from_pretrained(parts / "text").state_dict()
    neither = r"does not fit test_resnet, by name \(Missing key.* or in the order of a .pt file"
    files = {
        "fewer.pt": ({n: state[n] for n in names[2:]}, f'Missing key.*"{names[0]}", "{names[1]}"'),
        "vit.pt": (image_tower("test_vit").state_dict(), neither),
        "kinds.pt": (renamed(swapped), neither),
        "longer.pt": (renamed(state) | {"more": torch.ones(1)}, neither),
        "unordered.safetensors": (renamed(state), neither),
        "two.pt": ({"a": state, "b": state}, "holds a, b; save the weights you mean"),
        "code.pt": ({"model": torch.nn.Linear(1, 1)}, "holds a torch.nn.*Linear, which is code"),
        "text-deep.pt": (text | {"encoder.layer.5.x": torch.ones(1)}, 'Unexpected.*"encoder.layer'),
        "text-other.pt": (state, 'Missing key.*"embeddings.word_embeddings.weight"'),
    }
    for name, (contents, message) in files.items():
        (save_file if name.endswith("safetensors") else torch.save)(contents, tmp_path / name)
        part = "text_weights" if name.startswith("text") else "image_weights"
        with pytest.raises(ValueError, match=message):
            make(parts, tmp_path / "out", **{part: tmp_path / name})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["", "bert.", "0.auto_model."])
def test_text_weights_from_a_file(parts, tmp_path, prefix):
    state = AutoModel.from_pretrained(parts / "text").state_dict()
    state = {key: value + 1 for key, value in state.items()}
    contents = {prefix + key: value for key, value in state.items()}
    contents[f"{prefix}embeddings.position_ids"] = torch.arange(12)[None]
    contents |= {"cls.predictions.bias": torch.ones(14)} if prefix else {}
    torch.save(contents, tmp_path / "text.pt")
    ignored = shutil.ignore_patterns("model.safetensors", "vocab.txt")
    bare = shutil.copytree(parts / "text", tmp_path / "bare", ignore=ignored)
    out = make(parts, tmp_path / "out", text=bare, text_weights=tmp_path / "text.pt")
    for key, value in stock(out)[0].text.transformer.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_of_an_encoder_and_a_decoder_the_encoder_is_the_tower(parts, tmp_path):
    text = shutil.copytree(parts / "text", tmp_path / "text")
    sizes = {"d_model": 64, "vocab_size": 14, "max_position_embeddings": 32, "pad_token_id": 0}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 16}
    source = M2M100Model(M2M100Config(**sizes))
    source.save_pretrained(text)
    tower = stock(make(parts, tmp_path / "out", text=text))[0].text.transformer
    attention = "layers.0.self_attn.k_proj.weight"
    assert torch.equal(tower.state_dict()[attention], source.encoder.state_dict()[attention])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[tv]o*", "no tokenizer in the folder .*text"),
        ("config.json", "text cannot be read .* give a folder that has its config.json"),
        ("model.safetensors", "text cannot be read .* give a folder"),
        ({"model_type": "distilbert"}, "cannot build .*text .*; it takes text towers of BERT's"),
        ({"model_type": "clip", "hidden_size": None}, "of the type clip; open_clip takes text "),
        ({"num_hidden_layers": 3}, "not those of its config.json: encoder.layer.2.* is missing"),
        ({"num_hidden_layers": 1}, "encoder.layer.1.* is missing, .* or one too many"),
        ({"intermediate_size": 8}, "dense.* is missing, of another shape"),
        ({"vocab_size": 9}, "has 14 tokens, the text tower 9"),
        ({"pad_token_id": 3}, "pads, masks or pools texts in another way than .*text"),
        ({"hidden_size": "wide"}, "text cannot be read .*hidden_size|cannot build .*text "),
    ],
)
def test_text_folders_that_cannot_be_used(parts, tmp_path, change, message):
    """``change`` is of the config.json, or says which files are removed."""
    text = shutil.copytree(parts / "text", tmp_path / "text")
    if isinstance(change, str):
        for file in text.glob(change):
            file.unlink()
    else:
        change_json(text / "config.json", **change)
    with pytest.raises((ValueError, OSError), match=message):
        make(parts, tmp_path / "out", text=text)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": "test_resnt"}, "cannot build test_resnt, .*Unknown model"),
        ({"image_weights": None}, "no weights of it at hand .*--image-weights"),
        ({"image_weights": "nowhere.pt"}, "nowhere.pt cannot be read"),
        ({"text": "BARE", "text_pooler": "own"}, r"pooler.dense.* is missing"),
        ({"text": "nobody/nothing"}, "text tower nobody/nothing cannot be read"),
        ({"image": "test_vit", "image_size": 100}, "test_vit cannot take images of 100 px"),
        ({"context_length": 13}, "context_length 13 is more than the 12 tokens"),
    ],
)
def test_settings_that_cannot_be(parts, tmp_path, settings, message):
    if settings.get("text") == "BARE":
        settings = settings | {"text": text_folder(tmp_path / "text")}
    with pytest.raises((ValueError, OSError), match=message):
        make(parts, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_an_overwrite_does_not_delete_the_text_tower(parts, tmp_path):
    out = make(parts, tmp_path / "out")
    with pytest.raises(FileExistsError, match="out, which is replaced"):
        make(parts, out, text=out, overwrite=True)
    assert make(parts, out, overwrite=True) == out


def test_no_network_is_needed_nor_the_parts_later(parts, tmp_path, monkeypatch, caplog):
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a) or 1 / 0)
    monkeypatch.setattr(socket.socket, "connect", lambda *a: asked.append(a) or 1 / 0)
    make(shutil.copytree(parts, tmp_path / "parts"), tmp_path / "out")
    assert "After a move, set hf_model_name" in caplog.text and not asked
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "parts")
    model, _, tokenizer = stock(tmp_path / "out")
    assert model.encode_text(tokenizer(["a red circle"])).shape == (1, 64)
    # Moved, it needs the one line that the warning names.
    moved = shutil.move(tmp_path / "out", tmp_path / "moved")
    with pytest.raises(OSError, match="out"):
        stock(moved)
    config = moved / "open_clip_config.json"
    named = config.read_text(encoding="utf-8").replace(f'{tmp_path / "out"}"', f'{moved}"')
    config.write_text(named, encoding="utf-8")
    assert stock(moved)[0].text.context_length == 12


def test_the_folder_trains_with_both_towers_locked_and_exports(parts, pairs, tmp_path):
    image = "test_efficientnet"
    out = make(parts, tmp_path / "towers", image, image_size=32)
    words = ["--loss", "otter", "--model", f"local-dir:{out}", "--epochs", "1", "--lock-image"]
    words += ["--lock-text", "--lock-text-freeze-layer-norm"]
    checkpoints = train(pairs, tmp_path / "logs", *words)
    before, after = stock(out)[0].state_dict(), load(checkpoints / "epoch_1.pt")["state_dict"]
    learned = {key for key in before if not torch.equal(before[key], after[key])}
    assert learned == {"visual.head.proj.weight", "text.proj.weight", "logit_scale"}

    exported = export_checkpoint(checkpoints.parent, tmp_path / "exported")
    shutil.rmtree(out)
    model, preprocess, _ = stock(exported)
    assert torch.equal(model.text.proj.weight, after["text.proj.weight"])
    assert tuple(model.visual.preprocess_cfg["mean"]) == timm.get_pretrained_cfg(image).mean
    assert preprocess.transforms[0].size == 32
