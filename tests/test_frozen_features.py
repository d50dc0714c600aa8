"""``--feature-cache``: training on kept features is training on the data, and nothing stale is used."""

import json
import os
import shutil
import types
from collections import Counter
from unittest.mock import Mock

import numpy as np
import open_clip
import pytest
import torch
from conftest import text_folder
from data_helpers import samples, write_tar
from open_clip_train.train import AverageMeter
from test_zeroshot_training import results
from training_helpers import load, train, trained_once

from otter_openclip.frozen import encode
from otter_openclip.frozen.loader import image_column
from otter_openclip.frozen.store import FeatureFiles, in_half, usable

LOCK_TEXT = "--lock-text --lock-text-freeze-layer-norm"
LOCKS = {"image": "--lock-image", "text": LOCK_TEXT, "both": f"--lock-image {LOCK_TEXT}"}
LOCKS["rn"] = "--lock-image"  # of which the whole tower is the prefix


@pytest.fixture(scope="module")
def model(hf_model, tmp_path_factory):
    """The tiny towers without dropout, in a folder."""
    folder = tmp_path_factory.mktemp("still")
    config = open_clip.get_model_config(hf_model)
    config["vision_cfg"]["timm_drop"] = 0.0
    tower = str(text_folder(folder / "tower", dropout=0.0))
    config["text_cfg"] |= {"hf_model_name": tower, "hf_tokenizer_name": tower}
    (folder / "tiny-still.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
    return "tiny-still"


@pytest.fixture(autouse=True)
def losses(monkeypatch):
    """Every step's losses of the runs so far, in all their digits."""
    seen, stock = [], AverageMeter.update

    def record(self, value, count=1):
        stock(self, value, count)
        if count > 1:  # of a batch
            seen.append(value)

    monkeypatch.setattr(AverageMeter, "update", record)
    return seen


def same_losses(losses):
    half = len(losses) // 2
    assert half > 5 and len(losses) == 2 * half
    assert losses[:half] == pytest.approx(losses[half:], abs=1e-5, rel=1e-5)


@pytest.fixture
def cached(pairs, tmp_path, model):
    """Train on kept features, or live by that name; the folder and how many files were made."""

    def run(name, *extra, data=pairs, loss="infonce", lock="both"):
        before = set((tmp_path / "cache").glob("*/*.npy"))
        words = f"--loss {loss} --model {model} {LOCKS[lock]} --epochs 1"
        cache = f" --feature-cache {tmp_path}/cache" if name != "live" else ""
        train(data, tmp_path / name, words + cache, *extra)
        made = set((tmp_path / "cache").glob("*/*.npy")) - before
        return tmp_path / name, Counter(path.parent.name.split("-")[0] for path in made)

    return run


ALL, NONE = {"image": 2, "text": 2}, {}


@pytest.mark.parametrize(
    ("loss", "lock"), [("infonce", "both"), ("otter", "image"), ("otter", "text"), ("otter", "rn")]
)
def test_same_as_live(pairs, tmp_path, model, losses, loss, lock):
    words = f"--loss {loss} --model {'tiny-rn' if lock == 'rn' else model} {LOCKS[lock]}"
    live = train(pairs, tmp_path / "live", words)
    cached = train(pairs, tmp_path / "cached", words, f"--feature-cache {tmp_path}/cache")
    same_losses(losses)
    one, other = (load(path / "epoch_2.pt") for path in (live, cached))
    assert one.keys() == other.keys()
    assert one["state_dict"].keys() == other["state_dict"].keys()


def test_loss_clip_and_what_stock_open_clip_loads(cached, model, tmp_path):
    """A whole model: the frozen towers as they were, the rest trained, nothing of ours in it."""
    before = trained_once(model, tmp_path / "start.pt")
    words = f"--pretrained {tmp_path}/start.pt --lock-image-freeze-bn-stats"
    folder, _ = cached("clip", words, loss="clip")
    checkpoint = load(folder / "run" / "checkpoints" / "epoch_1.pt")
    after = checkpoint["state_dict"]
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"logit_scale", "text.proj.weight", "visual.head.proj.weight"}
    assert before.keys() == after.keys() and "otter" not in checkpoint


def test_live_frozen_towers_see_no_augmentation(pairs, tmp_path, model, monkeypatch):
    """As kept ones do, unless it is asked for."""
    seen, stock = [], open_clip.transform.image_transform_v2

    def record(*args, is_train, **kwargs):
        made = stock(*args, is_train=is_train, **kwargs)
        return lambda image: seen.append(is_train) or made(image)

    monkeypatch.setattr("open_clip.factory.image_transform_v2", record)
    for words, random in {
        "free": True,
        "frozen --lock-image": False,
        "asked --lock-image --aug-cfg scale=(0.9,1.0)": True,
        "part --lock-image --lock-image-unlocked-groups 1": True,
    }.items():
        seen.clear()
        train(pairs, tmp_path, f"--loss infonce --model {model} --epochs 1 --name {words}")
        assert set(seen) == {random}, words


def shards(pairs, out, *, change=lambda shard, key, suffix, content: content):
    """A changed copy of the shards: of all contents but those for which ``change`` gives None."""
    out.mkdir()
    shutil.copy(pairs / "sizes.json", out)
    for path in sorted(pairs.glob("*.tar")):
        files = {}
        for key, parts in samples(path).items():
            for suffix, content in parts.items():
                files[f"{key}.{suffix}"] = change(path.name, key, suffix, content)
        write_tar(out / path.name, {n: c for n, c in files.items() if c is not None})
    return out


def test_a_complete_cache_is_all_that_a_start_needs(cached, pairs, tmp_path, monkeypatch):
    """Behind unchanged size and time the shards may hold anything; no file is read before its turn."""
    data = shards(pairs, tmp_path / "data")
    cached("first", data=data)
    for shard in data.glob("*.tar"):
        status = shard.stat()
        shard.write_bytes(b"?" * status.st_size)
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    read, stock = [], FeatureFiles.read
    monkeypatch.setattr(FeatureFiles, "read", lambda s, name: read.append(name) or stock(s, name))
    monkeypatch.setattr(encode, "DataLoader", None)
    assert cached("part", "--train-num-samples 12", data=data)[1] == NONE
    assert {os.path.dirname(shard) for shard in read} == {str(data)}


def test_features_are_mapped_and_a_damaged_file_is_named(tmp_path):
    files, shard = FeatureFiles(tmp_path), tmp_path / "a.tar"
    shard.touch()
    files.write(str(shard), np.zeros((5, 1, 3), np.float16))
    assert isinstance(files.read(str(shard)), np.memmap)
    file = files.path(str(shard))
    for damage in (b"", b"\x93NUMPY no more"):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=f"{file} is damaged .*; remove it"):
            files.read(str(shard))


def test_a_run_that_a_full_disk_ended_goes_on(cached, tmp_path, monkeypatch, losses):
    cached("whole")
    shutil.rmtree(tmp_path / "cache")
    stock, calls = FeatureFiles.write, []

    def fail(self, shard, rows):
        calls.append(shard)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        stock(self, shard, rows)

    monkeypatch.setattr(FeatureFiles, "write", fail)
    with pytest.raises(SystemExit, match="No space left on device"):
        cached("ended")
    monkeypatch.setattr(FeatureFiles, "write", stock)
    assert cached("again")[1] == {"image": 1, "text": 2}
    same_losses(losses)


def test_what_changed_is_not_taken_from_the_cache(cached, pairs, tmp_path, losses):
    """Of a shard that was written again all is made again, and of no other."""

    def swap(shard, key, suffix, content):
        swapped = suffix == "txt" and key.endswith("3") and shard == "00001.tar"
        return b"a line a circle" if swapped else content

    data = shards(pairs, tmp_path / "data")
    cached("first", data=data)
    changed = shards(pairs, tmp_path / "changed", change=swap)
    os.replace(changed / "00001.tar", data / "00001.tar")
    losses.clear()
    assert cached("again", data=data)[1] == {"image": 1, "text": 1}
    cached("live", data=data)
    same_losses(losses)


def test_other_weights_transforms_tokens_and_precisions_have_their_own(cached, model, tmp_path):
    few = "--train-num-samples 12"
    cached("first", few)
    trained_once(model, tmp_path / "other.pt")
    image = {"image": 2}
    for name, words, made in (
        ("weights", f"--pretrained {tmp_path}/other.pt", image),  # BERT is pretrained
        ("crop", "--reference-crop", image),
        ("both", "--force-context-length 4 --image-interpolation bilinear", ALL),
        ("amp", "--precision amp_bf16", ALL),
        ("run", "--lr 1 --workers 2 --batch-size 9", NONE),
    ):
        found = cached(name, few, words)[1]
        assert found == made or (name == "weights" and found == ALL), name
    assert cached("again", few)[1] == NONE


def test_how_a_setting_was_written_down_is_no_other_setting(tmp_path):
    """A mean is a tuple in open_clip's defaults and a list in a folder's JSON."""
    model = open_clip.create_model("tiny-vit")
    config = model.visual.preprocess_cfg

    def folder():
        made = image_column(model, "visual", tmp_path, config, device=torch.device("cpu"))
        return made.files.folder

    keys = [folder()]
    config |= {"mean": list(config["mean"]), "std": list(config["std"]), "size": [32, 32]}
    keys.append(folder())
    config["mean"][0] += 0.01
    assert keys[0] == keys[1] != folder()


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
    keys = [encode.tower_fingerprint(model, name, name, {}) for model in (one, same, other)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("lock", ["both", "text"])
def test_samples_that_open_clip_drops(cached, pairs, tmp_path, losses, lock):
    """Unreadable images, captions that are not UTF-8, missing halves: left out in the same places."""

    def spoil(shard, key, suffix, content):
        number = int(key[-2:])
        if suffix == "png":
            return {3: content[:40], 11: b"", 12: None}.get(number, content)
        return {5: b"\xff\xfe", 6: None}.get(number, content)

    data = shards(pairs, tmp_path / "spoilt", change=spoil)
    cut = data / "00001.tar"  # within a sample
    cut.write_bytes(cut.read_bytes()[:-14000])
    for name in ("live", "cached"):
        cached(name, data=data, lock=lock)
    same_losses(losses)


def test_a_shard_that_is_drawn_twice_in_a_row(cached, losses):
    for name in ("live", "cached"):
        cached(name, "--dataset-resampled --train-num-samples 144", lock="text")
    same_losses(losses)


def test_a_loader_process_without_a_batch_is_told_in_one_line(cached):
    with pytest.raises(SystemExit, match=r"^error: --train-data gives no batch of 40 in loader"):
        cached("few", "--workers 2 --batch-size 40")


def test_float16_where_it_is_near_enough():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 1, 768)).astype(np.float32)
    rows[7] = np.nan  # of a sample that cannot be used
    half, said = in_half(rows)
    assert half.dtype == np.float16 and said.startswith("float16: off by")
    assert usable(half).tolist() == usable(rows).tolist() == [i != 7 for i in range(300)]
    for wide in (rows * 1e6, rows * 1e-7, rows[:, :, :8]):  # beyond its range, below it, too few
        same, said = in_half(wide)
        assert same is wide and said.startswith("float32: in float16")


def test_shards_that_cannot_be_told_apart_are_refused(cached, pairs, tmp_path):
    """Of one name, size and time: one would be given the other's features."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for path in [*pairs.glob("*.tar"), pairs / "sizes.json"]:
            shutil.copy2(path, tmp_path / name)
    words = f"--train-data {tmp_path}/{{a,b}}/00000.tar --train-num-samples 72"
    with pytest.raises(SystemExit, match=r"b/00000.tar and .*a/00000.tar have one name, size and"):
        cached("run", words)


def test_a_tower_that_gives_nan_is_no_unreadable_image(cached, monkeypatch):
    """Which are kept as NaN: its samples would be left out in silence."""
    stock = encode.TowerEncoder.__call__

    def overflow(self, inputs):
        features = stock(self, inputs)
        features[5] = torch.inf
        return features

    monkeypatch.setattr(encode.TowerEncoder, "__call__", overflow)
    with pytest.raises(SystemExit, match="the image tower gives is no finite vector for each"):
        cached("run")


def test_a_shard_without_samples_or_with_nothing_usable(cached, pairs, tmp_path):
    data = shards(pairs, tmp_path / "data")
    write_tar(data / "00002.tar", {})
    write_tar(data / "00003.tar", {"a.json": b""})
    words = f"--train-data {data}/{{00000..00003}}.tar --train-num-samples 72"
    assert cached("run", words)[1] == {"image": 4, "text": 4}
    for file in tmp_path.glob("cache/*/0000[23]-*.npy"):
        assert not usable(np.load(file)).any()


def test_evaluation_in_training_finds_the_same_features(cached, labelled):
    """``--zeroshot-data`` with and without the folder of features, and again from it alone."""
    words = f"--zeroshot-data {labelled} --zeroshot-frequency 1"
    folder, made = cached("first", words)
    assert made == {"image": 3, "text": 2}  # the evaluation's shard among them
    live, _ = cached("live", words)
    (one,), (other,) = (results(path / "run" / "checkpoints") for path in (folder, live))
    assert one == pytest.approx(other, abs=1e-6)
    assert cached("again", words)[1] == NONE


def test_a_rank_that_looks_later_does_its_share_all_the_same(monkeypatch, tmp_path):
    """What the first rank has written by then changes nothing of who does what."""
    shards = [str(tmp_path / f"{number}.tar") for number in range(4)]
    for shard in shards:
        write_tar(tmp_path / shard, {"0.txt": b"", "1.txt": b""})
    done = []
    monkeypatch.setattr(encode, "dist", Mock())
    monkeypatch.setattr(encode, "_encode", lambda mine, *_, **__: done.append(mine))
    files = FeatureFiles(tmp_path / "image-x")
    column = types.SimpleNamespace(kind="image", files=files, inputs=None)
    files.write(shards[0], np.zeros((2, 1, 3), np.float32))
    with pytest.raises(ValueError, match="has no features of"):
        encode.fill([column], shards, device=torch.device("cpu"), rank=1, world_size=2)
    assert done == [shards[1::2]]
