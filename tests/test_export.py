"""Export: stock open_clip and clip_benchmark use the folder as it is."""

import json

import open_clip
import pytest
import torch
from conftest import MODELS
from data_helpers import refused
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import load_file, save_file
from training_helpers import load, stock, train

from otter_openclip import cli
from otter_openclip.model_folders import export, folder
from otter_openclip.model_folders.export import export_checkpoint


@pytest.fixture(scope="module")
def run(pairs, tmp_path_factory):
    """A short OTTER run with model flags, the folder logs/run."""
    logs = tmp_path_factory.mktemp("logs")
    flags = "--force-image-size 24 --force-context-length 7 --image-mean 0.1 0.2 0.3 "
    flags += "--image-resize-mode squash --image-interpolation bilinear --epochs 1"
    train(pairs, logs, "--loss", "otter", "--model", "tiny-vit", *flags.split())
    return logs / "run"


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_features_preprocessing_and_tokens_are_the_runs(run, tmp_path, weights):
    checkpoint = load(run / "checkpoints" / "epoch_1.pt")
    state = checkpoint["state_dict" if weights == "student" else "state_dict_ema"]
    out = export_checkpoint(run, tmp_path / "deep" / "out", weights=weights)
    model, preprocess, tokenizer = stock(out)
    images, texts = torch.randn(3, 3, 24, 24), tokenizer(["a red circle", "b", "c"])
    assert texts.shape == (3, 7)
    source = open_clip.create_model("tiny-vit", force_image_size=24, force_context_length=7)
    source.load_state_dict(state)
    with torch.no_grad():
        found, expected = model(images, texts), source.eval()(images, texts)
    assert all(map(torch.equal, found, expected))
    config = model.visual.preprocess_cfg
    assert list(config["mean"]) == [0.1, 0.2, 0.3]
    assert (config["interpolation"], config["resize_mode"]) == ("bilinear", "squash")
    assert preprocess.transforms[0].size == (24, 24)
    student = checkpoint["state_dict"]["text_projection"]
    assert torch.equal(model.text_projection, student) == (weights == "student")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/nothing.pt", "out"], "no checkpoint"),
        (["{run}", "{run}"], "exists; choose another folder or pass --overwrite"),
        (["{run}", "out", "--model", "tiny-vt"], "did you mean tiny-vit"),
        (["{run}", "out", "--model", "tiny-rn"], "does not fit the model tiny-rn"),
        (["{bare}", "out"], "pass --model"),
        (["{bare}", "out", "--model", "tiny-vit", "--weights", "teacher"], "has no EMA teacher"),
        (["text.pt", "out", "--model", "tiny-vit"], "cannot be read as a checkpoint"),
        (["list.pt", "out", "--model", "tiny-vit"], "holds a list"),
        (["number.pt", "out", "--model", "tiny-vit"], "holds no state_dict"),
    ],
)
def test_errors_name_input_and_fix(run, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    torch.save(load(run / "checkpoints" / "epoch_1.pt")["state_dict"], tmp_path / "bare.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": 3}, tmp_path / "number.pt")
    (tmp_path / "text.pt").write_text("hello", encoding="utf-8")
    words = [a.format(run=run, bare=tmp_path / "bare.pt") for a in arguments]
    refused(capsys, cli.main(["export", *words]), message)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def made_run(tmp_path):
    """A run's folder with one checkpoint, made here: fast, and free to be damaged."""
    return write_run(tmp_path / "logs" / "made")


def write_run(folder, **params):
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    params = {"model": "tiny-vit", "image_mean": None, **params}
    lines = [f"{name}: {value}\n" for name, value in params.items()]
    (folder / "params.txt").write_text("".join(lines), encoding="utf-8")
    save_run(folder, open_clip.create_model("tiny-vit").state_dict(), 1)
    return folder


def save_run(folder, state, epoch, name=None):
    path = folder / "checkpoints" / f"epoch_{name or epoch}.pt"
    torch.save({"epoch": epoch, "name": "made", "state_dict": state, "optimizer": {}}, path)
    return path


def files(folder):
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_overwrite_deletes_nothing_but_an_earlier_export(made_run, tmp_path, capsys):
    before = files(made_run)
    words = ["export", str(made_run), str(made_run), "--overwrite"]
    refused(capsys, cli.main(words), "is not an exported model")
    (made_run / "open_clip_config.json").write_text("{}", encoding="utf-8")
    refused(capsys, cli.main(words), "which is replaced")
    (made_run / "open_clip_config.json").unlink()
    assert files(made_run) == before


def test_earlier_export_survives_a_failed_rename(made_run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    export_checkpoint(made_run, out)
    before, stock = files(out), folder.Path.rename

    def rename(self, target):
        if target == out and (self / "README.md").stat().st_mtime_ns not in before.values():
            raise OSError("disk gone")
        return stock(self, target)

    monkeypatch.setattr(folder.Path, "rename", rename)
    with pytest.raises(OSError, match="disk gone"):
        export_checkpoint(made_run, out, overwrite=True)
    assert files(out) == before
    monkeypatch.undo()
    (out / "old").touch()
    export_checkpoint(made_run, out, overwrite=True)
    assert files(out).keys() == before.keys() and files(out) != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logs", "out"]


def test_a_runs_folder_means_its_newest_checkpoint(made_run, tmp_path, monkeypatch, capsys):
    state = load(made_run / "checkpoints" / "epoch_1.pt")["state_dict"]
    save_run(made_run, state, 1, name="latest")
    newest = save_run(made_run, state, 10)  # resumed without --save-most-recent: latest is stale
    save_run(made_run, state, 9)
    assert cli.main(["export", str(made_run), str(tmp_path / "one")]) == 0
    assert f"the student of {newest} as tiny-vit" in capsys.readouterr().out
    latest = save_run(made_run, state, 11, name="latest")
    assert cli.main(["export", str(made_run / "checkpoints"), str(tmp_path / "two")]) == 0
    assert f"the student of {latest} as tiny-vit" in capsys.readouterr().out
    monkeypatch.chdir(made_run / "checkpoints")  # params.txt is found from a bare file name too
    assert cli.main(["export", "epoch_9.pt", str(tmp_path / "three")]) == 0


def test_flags_win_over_params_and_these_over_the_tag_a_run_started_from(tmp_path, monkeypatch):
    tag = {"mean": (0.5, 0.5, 0.5), "std": (0.4, 0.4, 0.4), "resize_mode": "squash"}
    known = {("tiny-rn", "mine"): tag}
    monkeypatch.setattr(export, "get_pretrained_cfg", lambda *names: known.get(names))
    run = write_run(tmp_path / "run", model="tiny-rn", pretrained="mine", image_std=[0.3, 0.3, 0.3])
    flags = {"model": "tiny-vit", "image_resize_mode": "longest"}
    out = export_checkpoint(run, tmp_path / "out", **flags)
    preprocess = open_clip.create_model(f"local-dir:{out}").visual.preprocess_cfg
    assert list(preprocess["mean"]) == [0.5] * 3  # the tag's
    assert list(preprocess["std"]) == [0.3] * 3  # params.txt's
    assert preprocess["resize_mode"] == "longest"


@pytest.mark.parametrize(
    "made",
    [
        {"force_quick_gelu": True},
        {"force_custom_text": True},
        {"init_logit_bias": -7},  # of --siglip, whose weights have it
    ],
)
def test_forced_architecture_is_in_the_folder(tmp_path, made):
    source = open_clip.create_model("tiny-vit", **made).eval()
    wrapped = {f"_orig_mod.module.{key}": value for key, value in source.state_dict().items()}
    torch.save(wrapped, tmp_path / "bare.pt")
    flags = {name: True for name in made if name.startswith("force")}
    out = export_checkpoint(tmp_path / "bare.pt", tmp_path / "out", model="tiny-vit", **flags)
    model = open_clip.create_model(f"local-dir:{out}").eval()
    assert type(model) is type(source)
    assert getattr(model, "logit_bias", None) == getattr(source, "logit_bias", None)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.encode_image(image), source.encode_image(image))


def damage(tensors, *args, **kwargs):
    key = next(iter(tensors))
    save_file(tensors | {key: tensors[key] + 1e-3}, *args, **kwargs)


def forget(model, path, config):
    save_config_for_hf(model, path, {k: v for k, v in config.items() if k != "quick_gelu"})


@pytest.mark.parametrize(
    ("what", "name", "change"),
    [("tensors", "save_file", damage), ("features", "save_config_for_hf", forget)],
)
def test_what_was_written_wrongly_is_noticed(made_run, tmp_path, monkeypatch, what, name, change):
    monkeypatch.setattr(folder, name, change)
    with pytest.raises(RuntimeError, match=f"differs from training in {what}"):
        export_checkpoint(made_run, tmp_path / "out", force_quick_gelu=True)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_links_to_a_run_are_the_run(run, tmp_path):
    """Its params.txt is found, and the model flags in it."""
    (tmp_path / "latest").symlink_to(run / "checkpoints")
    (tmp_path / "chosen.pt").symlink_to(run / "checkpoints" / "epoch_1.pt")
    for link in ("latest", "latest/epoch_1.pt", "chosen.pt"):
        out = export_checkpoint(tmp_path / link, tmp_path / f"{link}-out")
        assert open_clip.create_model(f"local-dir:{out}").visual.image_size == (24, 24)


def register(path, **changes):
    """Let open_clip know tiny-timm with another image tower, under the file's name."""
    vision = MODELS["tiny-timm"]["vision_cfg"] | changes
    path.write_text(json.dumps(MODELS["tiny-timm"] | {"vision_cfg": vision}), encoding="utf-8")
    open_clip.add_model_config(path)


def test_batch_norm_that_open_clip_froze(pairs, tmp_path, capsys):
    """It saves no counters; where it drops an activation, nothing could give what was trained."""
    words = ["--lock-image", "--lock-image-freeze-bn-stats", "--epochs", "1"]
    checkpoints = train(pairs, tmp_path, *words)
    state = load(checkpoints / "epoch_1.pt")["state_dict"]
    assert "visual.bn1.num_batches_tracked" not in state
    out = export_checkpoint(checkpoints, tmp_path / "out")
    model = open_clip.create_model(f"local-dir:{out}")
    assert torch.equal(model.visual.bn1.running_mean, state["visual.bn1.running_mean"])
    register(tmp_path / "tiny-act.json", timm_model_name="test_efficientnet")
    state = open_clip.create_model("tiny-act").state_dict()
    del state["visual.trunk.bn1.num_batches_tracked"]
    torch.save(state, tmp_path / "act.pt")
    words = ["export", tmp_path / "act.pt", tmp_path / "act-out", "--model", "tiny-act"]
    fault = "which drops the activation of visual.trunk.bn1"
    refused(capsys, cli.main(list(map(str, words))), fault)


def test_a_timm_tower_at_a_forced_size_is_refused(tmp_path):
    register(tmp_path / "tiny-timm-vit.json", timm_model_name="test_vit", image_size=160)
    state = open_clip.create_model("tiny-timm-vit", force_image_size=64).state_dict()
    torch.save(state, tmp_path / "bare.pt")
    flags = {"model": "tiny-timm-vit", "force_image_size": [64]}
    with pytest.raises(RuntimeError, match=r"cannot load .*size mismatch for visual.trunk"):
        export_checkpoint(tmp_path / "bare.pt", tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


# A checkpoint's tensor is written with its own numbers and dtype.
DTYPES = ("bfloat16", "float64", "int64", "bool")
KEPT = {name: lambda x, name=name: (9 * x).to(getattr(torch, name)) for name in DTYPES}
# And what spoils it: the error names file and tensor.
SPOILT = {
    "longer": lambda x: torch.cat([x, x]),
    "nan": lambda x: torch.full_like(x, torch.nan),
    "inf": lambda x: torch.full_like(x, torch.inf),
    "too large": lambda x: torch.full_like(x, 1e300, dtype=torch.float64),
    "sparse": lambda x: x.to_sparse(),
    "missing": None,
    "list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("what", [*KEPT, *SPOILT])
def test_a_tensor_is_written_as_it_is_or_named(tmp_path, what):
    state = open_clip.create_model("tiny-vit").state_dict()
    key, path, out = "text_projection", tmp_path / "bare.pt", tmp_path / "out"
    projection = state.pop(key)
    if what != "missing":
        state[key] = (KEPT | SPOILT)[what](projection)
    torch.save(state, path)
    if what in SPOILT:
        with pytest.raises(ValueError, match=f"^{path} .*{key}"):
            export_checkpoint(path, out, model="tiny-vit")
        assert not out.exists()
        return
    written = load_file(export_checkpoint(path, out, model="tiny-vit") / folder.WEIGHTS_FILE)
    assert written.keys() == state.keys()
    assert all(written[k].dtype == x.dtype and torch.equal(written[k], x) for k, x in state.items())
