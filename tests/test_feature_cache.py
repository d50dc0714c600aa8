"""``--feature-cache``: training on kept features is training on the data, and nothing stale is used."""

import json
import logging
import os
import pickle
import re
import shutil
import tarfile
from io import BytesIO

import numpy as np
import open_clip
import pytest
import torch
from open_clip_train.train import AverageMeter
from PIL import Image
from training_helpers import assert_same, load, train

from otter_openclip.frozen import encoding, filling, prefix
from otter_openclip.frozen.cached import _Gather
from otter_openclip.frozen.store import FeatureStore, digest

LOCK_TEXT = ["--lock-text", "--lock-text-freeze-layer-norm"]
LOCKS = {
    "image": ["--lock-image"],
    "text": LOCK_TEXT,
    "both": ["--lock-image", *LOCK_TEXT],
}


@pytest.fixture(scope="module")
def model(hf_model, tmp_path_factory):
    """The tiny towers without dropout, in a folder."""
    folder = tmp_path_factory.mktemp("still")
    config = open_clip.get_model_config(hf_model)
    config["vision_cfg"]["timm_drop"] = 0.0
    tower = folder / "tower"
    shutil.copytree(config["text_cfg"]["hf_model_name"], tower)
    bert = json.loads((tower / "config.json").read_text())
    bert |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tower / "config.json").write_text(json.dumps(bert))
    config["text_cfg"] |= {"hf_model_name": str(tower), "hf_tokenizer_name": str(tower)}
    (folder / "tiny-still.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return "tiny-still"


@pytest.fixture(autouse=True)
def losses(monkeypatch):
    """Every step's losses of the runs so far, in all their digits."""
    found = []
    stock = AverageMeter.update

    def record(self, value, count=1):
        stock(self, value, count)
        if count > 1:  # of a batch
            found.append(value)

    monkeypatch.setattr(AverageMeter, "update", record)
    return found


def same_losses(losses, tolerance=1e-5):
    """Those of two runs, one after the other."""
    half = len(losses) // 2
    assert half > 10 and len(losses) == 2 * half
    assert losses[:half] == pytest.approx(losses[half:], abs=tolerance, rel=tolerance)


@pytest.mark.parametrize("csv", [False, True], ids=["webdataset", "csv"])
@pytest.mark.parametrize(
    ("loss", "lock"), [("infonce", "both"), ("otter", "both"), ("otter", "image"), ("kd", "text")]
)
def test_same_as_live(pairs, tmp_path, model, losses, loss, lock, csv):
    extra = ["--loss", loss, "--model", model, *LOCKS[lock]]
    live = train(pairs, tmp_path / "live", *extra, csv=csv)
    cache = ["--feature-cache", str(tmp_path / "cache")]
    cached = train(pairs, tmp_path / "cached", *extra, *cache, csv=csv)
    same_losses(losses)
    one, other = (load(path / "epoch_2.pt") for path in (live, cached))
    assert one.keys() == other.keys()
    assert one["state_dict"].keys() == other["state_dict"].keys()


def encoded(text):
    """Tower -> how many features a run had to encode, from its log."""
    found = re.findall(r"of (\d+) (\w+) features (\d+) are in", text)
    return {kind: int(all_) - int(there) for all_, kind, there in found}


def shards(pairs, out, *, change=lambda key, suffix, content: content, reverse=False):
    """A changed copy of the shards: of all contents but those for which ``change`` gives None."""
    out.mkdir()
    shutil.copy(pairs / "sizes.json", out)
    for path in sorted(pairs.glob("*.tar")):
        with tarfile.open(path) as source, tarfile.open(out / path.name, "w") as target:
            members = source.getmembers()
            pairs_of = [members[i : i + 2] for i in range(0, len(members), 2)]
            for member in [m for two in pairs_of[:: -1 if reverse else 1] for m in two]:
                key, _, suffix = member.name.partition(".")
                content = change(key, suffix, source.extractfile(member).read())
                if content is not None:
                    member.size = len(content)
                    target.addfile(member, BytesIO(content))
    return out


@pytest.fixture
def cached(pairs, tmp_path, model, caplog):
    """Train on cached features of both towers; returns the folder and what had to be encoded."""
    caplog.set_level(logging.INFO)

    def run(name, *extra, data=pairs, loss="infonce", **kwargs):
        caplog.clear()
        words = ["--loss", loss, "--model", model, *LOCKS["both"]]
        cache = ["--feature-cache", str(tmp_path / "cache")]
        train(data, tmp_path / name, *words, *cache, *extra, **kwargs)
        return tmp_path / name, encoded(caplog.text)

    return run


def test_a_whole_tower_of_open_clip(pairs, tmp_path, losses):
    extra = ["--loss", "otter", "--model", "tiny-rn", "--lock-image"]
    train(pairs, tmp_path / "live", *extra)
    train(pairs, tmp_path / "cached", *extra, "--feature-cache", str(tmp_path / "cache"))
    same_losses(losses)


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], id="otter"),
        pytest.param(["--accum-freq", "2", "--batch-size", "6"], id="accum"),
        pytest.param(["--precision", "amp_bf16"], id="amp"),
        pytest.param(["--feature-views", "3", "--aug-cfg", "scale=(0.3,1.0)"], id="views"),
    ],
)
def test_resume_is_exact(cached, extra):
    whole, made = cached("whole", *extra, loss="otter")
    assert made["image"] > 50 and made["text"] > 10
    start = str(whole / "run" / "checkpoints" / "epoch_1.pt")
    again, made = cached("again", *extra, "--resume", start, loss="otter")
    assert made == {"image": 0, "text": 0}
    end = "run/checkpoints/epoch_2.pt"
    assert_same(load(whole / end), load(again / end))


def test_loss_clip_and_what_stock_open_clip_loads(cached, model, tmp_path):
    """A whole model: the frozen towers as they were, the rest trained, nothing of ours in it."""
    torch.manual_seed(1)
    start = open_clip.create_model(model)
    start.train()(torch.randn(64, 3, 32, 32))  # statistics other than the initial ones
    torch.save(start.state_dict(), tmp_path / "start.pt")
    extra = ["--pretrained", str(tmp_path / "start.pt"), "--lock-image-freeze-bn-stats"]
    folder, _ = cached("clip", *extra, loss="clip")
    checkpoint = load(folder / "run" / "checkpoints" / "epoch_2.pt")
    before, after = start.state_dict(), checkpoint["state_dict"]
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"logit_scale", "text.proj.weight", "visual.head.proj.weight"}
    start.load_state_dict(after)
    assert "otter" not in checkpoint


def test_live_frozen_towers_see_no_augmentation(pairs, tmp_path, model, monkeypatch):
    """As kept ones do, unless it is asked for."""
    seen = []
    stock = open_clip.transform.image_transform_v2

    def record(*args, is_train, **kwargs):
        made = stock(*args, is_train=is_train, **kwargs)
        return lambda image: seen.append(is_train) or made(image)

    monkeypatch.setattr("open_clip.factory.image_transform_v2", record)
    words = ["--loss", "infonce", "--model", model, "--epochs", "1", "--workers", "0"]
    for name, extra, random in (
        ("free", [], True),
        ("frozen", ["--lock-image"], False),
        ("asked", ["--lock-image", "--aug-cfg", "scale=(0.9,1.0)"], True),
        ("part", ["--lock-image", "--lock-image-unlocked-groups", "1"], True),
    ):
        seen.clear()
        train(pairs, tmp_path / name, *words, *extra)
        assert set(seen) == {random}, name


def test_a_killed_run_goes_on(cached, monkeypatch, losses):
    """What was encoded before is not encoded again, and the run is the one that was not killed."""
    whole, made = cached("whole")
    shutil.rmtree(whole.parent / "cache")
    monkeypatch.setattr(encoding, "ROUND", 0.0)
    monkeypatch.setattr(encoding.Encoder, "batch_size", 16)
    stock, calls = encoding.Encoder.__call__, []

    def die(self, given):
        calls.append(len(given))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return stock(self, given)

    monkeypatch.setattr(encoding.Encoder, "__call__", die)
    with pytest.raises(KeyboardInterrupt):
        cached("killed")
    assert cached("again")[1] == {"image": made["image"] - sum(calls[:3]), "text": made["text"]}
    same_losses(losses)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_damaged_files_are_made_again(cached, damage, caplog, losses):
    whole, made = cached("whole")
    (file,) = (whole.parent / "cache").glob("image-*/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes({"truncate": content[:-100], "flip": content, "empty": b""}[damage])
    assert cached("again")[1] == {"image": made["image"], "text": 0}
    assert f"{file} is damaged" in caplog.text
    same_losses(losses, 0)
    assert cached("third")[1] == {"image": 0, "text": 0}


def test_what_changed_is_not_taken_from_the_cache(cached, pairs, tmp_path, model, losses):
    """Captions, images, their order: only new ones are encoded, and the run is the live one."""

    def swap(key, suffix, content):
        return b"a line a circle" if suffix == "txt" and key.endswith("3") else content

    def repaint(key, suffix, content):
        if suffix == "txt" or not key.endswith("7"):
            return content
        buffer = BytesIO()
        Image.new("RGB", (40, 40), (int(key[-2]) * 20, 9, 9)).save(buffer, "PNG")
        return buffer.getvalue()

    cached("first")
    for name, expected, kwargs in (
        ("captions", {"image": 0, "text": 1}, {"change": swap}),
        ("images", {"image": 3, "text": 0}, {"change": repaint}),
        ("order", {"image": 0, "text": 0}, {"reverse": True}),
    ):
        data = shards(pairs, tmp_path / name, **kwargs)
        losses.clear()
        assert cached(f"{name}-run", data=data)[1] == expected, name
        live = tmp_path / f"{name}-live"
        train(data, live, "--loss", "infonce", "--model", model, *LOCKS["both"])
        same_losses(losses)


def test_other_weights_transforms_tokens_and_precisions_have_their_own(cached, model, tmp_path):
    _, made = cached("first")
    torch.manual_seed(3)
    other = open_clip.create_model(model)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    for name, extra, kept in (
        ("weights", ["--pretrained", str(tmp_path / "other.pt")], {"text": 0}),
        ("transform", ["--image-interpolation", "bilinear"], {"text": 0}),
        ("crop", ["--reference-crop"], {"text": 0}),
        ("context", ["--force-context-length", "4"], {"image": 0, "text": 6}),
        ("amp", ["--precision", "amp_bf16"], {}),
        ("views", ["--feature-views", "2"], {"text": 0}),
        ("seed", ["--seed", "9", "--workers", "2", "--batch-size", "9"], {"text": 0}),
    ):
        expected = {**made, **kept}
        assert cached(name, *extra)[1] == expected, name
    assert cached("again")[1] == {"image": 0, "text": 0}


@pytest.mark.parametrize(
    ("tower", "setting"),
    [
        ("vision", {"head_width": 4}),
        ("vision", {"pool_type": "avg"}),
        ("text", {"heads": 4}),
        ("text", {"pool_type": "first"}),
        ("text", {"no_causal_mask": True}),
    ],
)
def test_equal_weights_in_another_architecture_have_their_own(tower, setting):
    """No weight and no name of a module shows these settings."""
    config = open_clip.get_model_config("tiny-vit")
    part = f"{tower}_cfg"
    one = open_clip.CustomTextCLIP(**config)
    same = open_clip.CustomTextCLIP(**config).eval()
    same.set_grad_checkpointing()
    other = open_clip.CustomTextCLIP(**config | {part: config[part] | setting})
    for model in (same, other):
        model.load_state_dict(one.state_dict())
    name = {"vision": "visual", "text": "text"}[tower]
    keys = [encoding.fingerprint(model, name, name) for model in (one, same, other)]
    assert keys[0] == keys[1] != keys[2]


def test_samples_that_open_clip_drops(cached, pairs, tmp_path, model, caplog, losses):
    """Unreadable images, captions that are not UTF-8, missing halves: left out in the same places."""

    def spoil(key, suffix, content):
        number = int(key[-2:])
        if suffix == "png":
            return {3: content[:40], 11: b"", 12: None}.get(number, content)
        return {5: b"\xff\xfe", 6: None}.get(number, content)

    data = shards(pairs, tmp_path / "spoilt", change=spoil)
    cached("cached", data=data)
    assert "samples have no image or no readable caption; left out" in caplog.text
    assert "samples have an unreadable image; left out" in caplog.text
    train(data, tmp_path / "live", "--loss", "infonce", "--model", model, *LOCKS["both"])
    same_losses(losses)
    assert cached("again", data=data)[1] == {"image": 0, "text": 0}


def test_drawing_shards_in_which_no_image_can_be_read(cached, pairs, tmp_path):
    """Else it would draw for ever."""
    spoil = lambda key, suffix, content: content if suffix == "txt" else b"junk"  # noqa: E731
    data = shards(pairs, tmp_path / "spoilt", change=spoil)
    words = ["--dataset-resampled", "--train-num-samples", "48", "--workers", "0"]
    with pytest.raises(SystemExit, match=r"no sample of .* has a readable image"):
        cached("run", *words, data=data)


@pytest.mark.parametrize("csv", [False, True], ids=["webdataset", "csv"])
def test_a_table_and_shards_of_the_same_palette_images(cached, tmp_path, model, losses, csv):
    """open_clip resizes the one's in their palette, the other's in RGB: each has its own features."""
    data = tmp_path / "data"
    data.mkdir()
    rows = ["filepath\ttitle"]
    with tarfile.open(data / "00000.tar", "w") as tar:
        for i in range(36):
            noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(noise).convert("P").save(data / f"{i}.png")
            rows.append(f"{data}/{i}.png\ta red {i}")
            (data / f"{i}.txt").write_text(f"a red {i}")
            for suffix in ("png", "txt"):
                tar.add(data / f"{i}.{suffix}", f"{i}.{suffix}")
    shutil.copy(data / "00000.tar", data / "00001.tar")
    (data / "pairs.csv").write_text("\n".join(rows))
    words = ["--train-num-samples", "72", "--epochs", "4"]
    cached("other", *words, data=data, csv=not csv)
    losses.clear()
    assert cached("run", *words, data=data, csv=csv)[1] == {"image": 36, "text": 0}
    train(
        data,
        tmp_path / "live",
        "--loss",
        "infonce",
        "--model",
        model,
        *LOCKS["both"],
        *words,
        csv=csv,
    )
    same_losses(losses)


def test_a_damaged_file_in_a_folder_that_can_only_be_read(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path)
    for i in range(2):
        store.add([digest(bytes([i]))], torch.zeros(1, 1, 2))
    damaged = min(tmp_path.iterdir())
    damaged.write_bytes(b"")
    (tmp_path / "old.tmp").touch()
    os.utime(tmp_path / "old.tmp", (0, 0))

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    keys = np.array([digest(bytes([i])) for i in range(2)], "S16")
    assert sorted(FeatureStore(tmp_path).find(keys)) == [-1, 0]


def test_views_are_kept_and_follow_from_the_image(cached, tmp_path):
    extra = ["--feature-views", "3", "--aug-cfg", "scale=(0.3,1.0)"]
    found = []
    for name in ("one", "other"):
        cached(name, *extra, "--workers", "2" if name == "other" else "0", "--epochs", "1")
        (folder,) = (tmp_path / "cache").glob("image-*")
        store = FeatureStore(folder)
        rows = store.find(np.sort(store._keys))
        found.append([store.take(rows, view) for view in range(3)])
        shutil.rmtree(tmp_path / "cache")
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0][0], found[0][1], atol=1e-3)


def test_training_draws_a_view_each_time(tmp_path):
    store = FeatureStore(tmp_path)
    keys = [digest(bytes([i])) for i in range(4)]
    store.add(keys, torch.arange(12.0).view(4, 3, 1))
    store.refresh()
    rows = store.find(np.array(keys, "S16"))
    gather = _Gather({"visual": store}, {"visual": rows}, np.zeros((4, 2)), 3, torch.float32)
    drawn = torch.cat([gather([0, 1, 2, 3])[0] for _ in range(40)], dim=1)
    for row, values in enumerate(drawn):
        assert set(values.tolist()) == {3.0 * row, 3.0 * row + 1, 3.0 * row + 2}


def test_no_room(cached, monkeypatch):
    usage = shutil._ntuple_diskusage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 100))
    with pytest.raises(
        SystemExit, match=r"features need 0 MiB, 0 are free.*the same command goes on"
    ):
        cached("full")
    monkeypatch.undo()
    assert cached("again")[1]["image"] > 50


def test_a_disk_that_fills_up_keeps_what_is_done(cached, monkeypatch, tmp_path):
    monkeypatch.setattr(encoding, "ROUND", 0.0)
    monkeypatch.setattr(encoding.Encoder, "batch_size", 16)
    stock, calls = FeatureStore.add, []

    def add(self, keys, features):
        calls.append(len(keys))
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        stock(self, keys, features)

    monkeypatch.setattr(FeatureStore, "add", add)
    with pytest.raises(SystemExit, match="No space left on device; what is encoded stays there"):
        cached("full")
    assert not list(tmp_path.glob("cache/*/*.tmp"))
    monkeypatch.setattr(FeatureStore, "add", stock)
    _, left = cached("again")
    assert left["image"] == 70 - 32


def test_two_runs_may_build_one_cache(tmp_path):
    one, other = FeatureStore(tmp_path), FeatureStore(tmp_path)
    keys = [digest(bytes([i])) for i in range(6)]
    values = torch.arange(12.0).view(6, 1, 2)
    one.add(keys[:4], values[:4])
    other.add(keys[2:], values[2:])
    one.add(keys[:4], values[:4])
    for store in (one, other):
        store.refresh()
        rows = store.find(np.array([*keys, digest(b"none")], "S16"))
        assert rows[-1] == -1
        assert torch.equal(store.take(rows[:-1]), values[:, 0])
    assert torch.equal(pickle.loads(pickle.dumps(one)).take(rows[:-1]), values[:, 0])


@pytest.mark.parametrize("close", [True, False])
def test_bfloat16_where_it_is_close_enough(cached, monkeypatch, caplog, close):
    monkeypatch.setattr(filling, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(filling, "BF16_TOLERANCE", 0.1 if close else 1e-7)
    extra = ["--feature-precision", "bf16"]
    cached("first", *extra)
    assert ("to encode in bfloat16: up to" in caplog.text) == close
    assert ("to encode in float32: in bfloat16 they are up to" in caplog.text) != close
    assert cached("again", *extra)[1] == {"image": 0, "text": 0}
    monkeypatch.setattr(filling, "has_bfloat16", lambda device: False)
    assert cached("without", *extra)[1]["image"] == (70 if close else 0)


def test_a_worker_without_a_batch_is_told(cached):
    with pytest.raises(ValueError, match="usable samples, less than a batch of 40; lower"):
        cached("few", "--workers", "2", "--batch-size", "40")
    with pytest.raises(
        SystemExit, match="72 usable samples do not fill a batch of 100 on each of 1 ranks"
    ):
        cached("none", "--batch-size", "100")


def test_a_table_with_an_unreadable_image(cached, pairs, tmp_path):
    rows = (pairs / "pairs.csv").read_text().splitlines()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for file in ("broken.png", "missing.png"):
        (tmp_path / "pairs.csv").write_text("\n".join([*rows, f"{tmp_path / file}\ta red line"]))
        message = rf"^--feature-cache: row 73 of the table: cannot read .*{file}"
        with pytest.raises(SystemExit, match=message):
            cached(f"{file}-run", data=tmp_path, csv=True)


HEAD = ["--model", "tiny-still", "--feature-cache", "cache"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "none is: add --lock-image, --lock-text or both"),
        (
            ["--lock-image", "--lock-image-unlocked-groups", "2"],
            "--lock-image-unlocked-groups 2 trains",
        ),
        (
            ["--lock-text", "--lock-text-unlocked-layers", "1"],
            "--lock-text-unlocked-layers 1 trains",
        ),
        (["--lock-image", "--aug-cfg", "scale=(0.5,1.0)"], "add --feature-views K"),
        ([*LOCK_TEXT, "--feature-views", "2"], "needs --lock-image"),
        (["--lock-image", "--feature-views", "0"], "must be at least 1"),
        (["--lock-image", "--torchscript"], "does not go with --torchscript"),
        (["--lock-image", "--dataset-type", "synthetic"], "of type webdataset or csv"),
        (["--lock-image", "--feature-cache", __file__], "is not a folder"),
        (["--lock-image", "--feature-cache", f"{__file__}/cache"], f"{__file__} is not a folder"),
        (
            [
                "--lock-image",
                "--loss",
                "otter",
                "--distill-model",
                "RN50",
                "--distill-pretrained",
                "x",
            ],
            "does not go with --distill-model",
        ),
        (["--lock-image", "--loss", "clip", "--siglip"], "does not go with --siglip"),
        (["--feature-cahce", "x"], "did you mean --feature-cache"),
    ],
)
def test_refused_before_anything_is_made(pairs, tmp_path, model, words, message, capsys):
    with pytest.raises(SystemExit):
        train(pairs, tmp_path / "logs", *HEAD, *words)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_flags_that_need_the_cache(pairs, tmp_path, model, capsys):
    with pytest.raises(SystemExit):
        train(pairs, tmp_path, "--lock-image", "--feature-views", "2")
    assert "--feature-views belongs to --feature-cache DIR" in capsys.readouterr().err


def test_a_tower_that_pools_in_its_head(pairs, tmp_path, model, monkeypatch):
    monkeypatch.setattr(prefix, "_pools_a_map", lambda module: hasattr(module, "trunk"))
    extra = ["--model", model, "--feature-cache", str(tmp_path / "cache"), "--lock-image"]
    with pytest.raises(SystemExit, match="the image tower pools in its head"):
        train(pairs, tmp_path / "logs", *extra)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("tiny-rn", LOCK_TEXT, "add --force-custom-text"),
        ("tiny-still", ["--lock-text"], "embeddings.LayerNorm.weight is trained"),
    ],
)
def test_towers_without_a_prefix(pairs, tmp_path, model, name, words, message):
    """Known once the model is there: before the data are read."""
    extra = ["--model", name, "--feature-cache", str(tmp_path / "cache"), *words]
    with pytest.raises(SystemExit, match=message):
        train(pairs, tmp_path / "logs", *extra)
    assert not (tmp_path / "cache").exists()


def test_features_that_are_not_finite_are_no_unreadable_images(pairs, tmp_path, monkeypatch):
    """Which are kept as NaN: a tower that gives NaN would have its samples left out in silence."""
    stock = encoding.Encoder.__call__

    def overflow(self, given):
        features = stock(self, given)
        features[5] = torch.inf
        return features

    monkeypatch.setattr(encoding.Encoder, "__call__", overflow)
    words = ["--model", "tiny-vit", "--lock-image", "--feature-cache", str(tmp_path / "cache")]
    with pytest.raises(SystemExit, match="visual tower gives NaN or infinities for 1 of "):
        train(pairs, tmp_path, "--loss", "otter", *words)
