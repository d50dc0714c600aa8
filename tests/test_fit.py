"""``otter-openclip fit``: the folder, its list and weights, and training that goes on from it."""

import io
import json
import os
import random
import shutil

import numpy as np
import open_clip
import pytest
import torch
from conftest import COLOURS, SHAPES, picture
from data_helpers import as_file, samples, write_tar
from data_helpers import run as run_data
from forks import ranks
from PIL import Image
from test_zeroshot_training import damaged
from training_helpers import load, stock, train

from otter_openclip import cli, fit_heads
from otter_openclip.closed_form import fitting_run
from otter_openclip.closed_form.fitting_run import fit_folder
from otter_openclip.closed_form.headed_model import takes_off_a_mean
from otter_openclip.frozen.loader import split_weights
from otter_openclip.training import student_with_teacher

COUNT, SHARDS, WRONG = 300, 3, 60
LOCKED = "--epochs 1 --lock-image --lock-text --lock-text-freeze-layer-norm"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs of which every fifth has another's caption; the keys of these begin with w."""
    folder, rng = tmp_path_factory.mktemp("noisy"), random.Random(0)
    drawn = [(rng.choice(COLOURS), rng.choice(SHAPES)) for _ in range(COUNT)]
    for shard in range(SHARDS):
        files = {}
        for i in range(shard, COUNT, SHARDS):
            colour, shape = drawn[i]
            wrong = i < WRONG
            other = drawn[(i + 1) % WRONG] if wrong else drawn[i]
            key = f"{'w' if wrong and other != drawn[i] else 'r'}{i:04d}"
            files[f"{key}.png"] = as_file(picture(rng, colour, shape))
            files[f"{key}.txt"] = f"a {other[0]} {other[1]} no {i}".encode()
        write_tar(folder / f"{shard:05d}.tar", files)
    sizes = {f"{shard:05d}.tar": COUNT // SHARDS for shard in range(SHARDS)}
    (folder / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
    return folder


def shards_of(folder):
    return str(folder / "{00000..00002}.tar")


@pytest.fixture(scope="module")
def fitted(model, data, tmp_path_factory):
    """The command's output folder, and its feature cache."""
    folder = tmp_path_factory.mktemp("fit")
    out, cache = folder / "out", folder / "cache"
    words = f"fit {out} --model local-dir:{model} --train-data {shards_of(data)}"
    assert cli.main([*words.split(), "--feature-cache", str(cache), "--workers", "0"]) == 0
    return out, cache


def record(out):
    return json.loads((out / "fit.json").read_text(encoding="utf-8"))


def joined(folder):
    """One array of a folder's files of pairs."""
    rows = [np.load(file)[:, 0] for file in sorted(folder.glob("0000*.npy"))]
    return np.concatenate(rows).astype(np.float32)


def test_stock_open_clip_gives_what_was_fitted(fitted, data):
    out, cache = fitted
    images, texts = (joined(next(cache.glob(f"{kind}-*"))) for kind in ("image", "text"))
    heads, _, statistics = fit_heads(images, texts)
    model, transform, tokenizer = stock(out)
    files = list(samples(data / "00000.tar").values())[:20]
    pictures = [Image.open(io.BytesIO(each["png"])).convert("RGB") for each in files]
    with torch.no_grad():
        v = model.encode_image(torch.stack([*map(transform, pictures)]), normalize=True)
        t = model.encode_text(tokenizer([f["txt"].decode() for f in files]), normalize=True)
    w, u = heads.transform(torch.tensor(images[:20]), torch.tensor(texts[:20]))
    said = record(out)
    assert said["ridge_images"] == statistics.setting.ridge_images
    torch.testing.assert_close(v @ t.T, w @ u.T, atol=2e-2, rtol=0)
    assert model.logit_scale.exp().item() == pytest.approx(said["logit_scale"], rel=1e-5)
    assert said["correlations"] == sorted(said["correlations"], reverse=True)


def test_wrong_pairs_are_listed_with_captions_that_fit_better(fitted, data):
    out, _ = fitted
    said = record(out)
    keys = [pair["key"] for pair in said["wrong"]]
    low, high = said["wrong_share_interval"]
    assert low < WRONG / COUNT < high
    weights = [pair["weight"] for pair in said["wrong"]]
    assert weights == sorted(weights) and max(weights) < 0.5
    assert keys and sum(key[0] == "w" for key in keys) > 0.6 * len(keys)
    assert keys[0] in samples(data / said["wrong"][0]["shard"].rpartition("/")[2])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == min(24, len(keys)) and "http" not in page.replace("http-equiv", "")
    rows = [np.load(file) for file in sorted((out / "pair_weights").glob("*.npy"))]
    assert [row.shape for row in rows] == [(100, 1, 1)] * 3
    assert sum((row < 0.5).sum() for row in rows) == len(keys)


@pytest.mark.parametrize("shards", ["{00000..00002}.tar", "00001.tar"])
def test_two_ranks_write_what_one_does(model, data, tmp_path, shards):
    """Also without features: each makes those of its shards; and where the second has none."""
    words = f"--model local-dir:{model} --train-data {data}/{shards} --transport-pairs".split()
    assert cli.main(["fit", str(tmp_path / "one"), *words, "--workers", "0"]) == 0
    ranks(2, "-m", "otter_openclip.cli", "fit", tmp_path / "two", *words, "--workers", "0")
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    assert two["wrong_share"] == pytest.approx(one["wrong_share"])
    assert [p["key"] for p in two["wrong"]] == [p["key"] for p in one["wrong"]]
    assert two["correlations"] == pytest.approx(one["correlations"], abs=1e-5)


def test_listed_pairs_are_left_out_of_a_build(tmp_path, data, model):
    rows, table = [], tmp_path / "t.csv"
    for i, files in enumerate(samples(*sorted(data.glob("*.tar"))).values()):
        (tmp_path / f"{i}.png").write_bytes(files["png"])
        rows.append(f"{tmp_path / f'{i}.png'},{files['txt'].decode()}")
    table.write_text("\n".join(["filepath,title", *rows]), encoding="utf-8")
    words = ["csv", "--captions", table, "--images", tmp_path]
    assert run_data(*words, "--output", tmp_path / "all") == 0
    built = str(tmp_path / "all" / "00000.tar")
    out = fit_folder(tmp_path / "out", model=str(model), train_data=built, workers=0)
    wrong = {pair["key"] for pair in record(out)["wrong"]}
    assert run_data(*words, "--output", tmp_path / "some", "--drop-wrong", out / "fit.json") == 0
    before, after = (samples(tmp_path / name / "00000.tar") for name in ("all", "some"))
    assert wrong and after == {k: v for k, v in before.items() if k not in wrong}
    listed = (tmp_path / "some" / "dropped.tsv").read_text(encoding="utf-8")
    assert listed.count("looks wrong") == len(wrong)


ONE = {"shard": "a/0.tar", "key": "000000099"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "lists no pairs"),
        ({"wrong": [ONE, {**ONE, "shard": "b/0.tar"}]}, "a and b"),
        ({"wrong": [ONE]}, "no sample has the key 000000099"),
    ],
)
def test_a_list_that_is_of_something_else(tmp_path, capsys, content, said):
    (tmp_path / "fit.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "0.png").write_bytes(as_file(Image.new("RGB", (9, 9))))
    (tmp_path / "t.csv").write_text("filepath,title\n0.png,a dog", encoding="utf-8")
    words = f"--captions {tmp_path}/t.csv --images {tmp_path} --output {tmp_path}/o"
    assert run_data("csv", *words.split(), "--drop-wrong", tmp_path / "fit.json") == 2
    assert said in capsys.readouterr().err


def test_a_key_is_its_rows_whatever_pictures_are_there(tmp_path):
    (tmp_path / "t.csv").write_text("filepath,title\n0.png,a\n1.png,b", encoding="utf-8")
    for number in (1, 0):
        (tmp_path / f"{number}.png").write_bytes(as_file(Image.new("RGB", (9, 9), COLOURS[number])))
        out = tmp_path / f"with-{number}"
        assert run_data("csv", "--captions", tmp_path / "t.csv", "--output", out) == 0
        assert samples(out / "00000.tar")["000000001"]["txt"] == b"b"


def first_losses(logs):
    """The first step's terms, as the log has them."""
    log = (logs / "out.log").read_text(encoding="utf-8")
    words = log[log.index("Train Epoch") :].partition("\n")[0].split()
    return {w[:-1]: float(words[i + 1]) for i, w in enumerate(words) if w.endswith("oss:")}


@pytest.mark.parametrize("cached", [True, False], ids=["kept features", "live"])
@pytest.mark.parametrize("accum", [1, 2])
def test_weights_multiply_the_contrastive_term(fitted, data, tmp_path, cached, accum):
    """With one weight for all pairs the term is that many times as large, and the other the same."""
    out, cache = fitted
    alike = shutil.copytree(out, tmp_path / "alike")
    for file in (alike / "pair_weights").glob("*.npy"):
        np.save(file, np.full((100, 1, 1), 0.25, np.float32))
    words = f"--model local-dir:{out} --loss otter {LOCKED} --train-data {shards_of(data)}"
    words += f" --batch-size {50 // accum} --accum-freq {accum}"
    words += f" --feature-cache {cache}" if cached else ""
    train(data, tmp_path, words, "--name plain")
    train(data, tmp_path, words, f"--name quarter --pair-weights {alike}/fit.json")
    plain, quarter = (first_losses(tmp_path / name) for name in ("plain", "quarter"))
    assert quarter["Contrastive_loss"] == pytest.approx(plain["Contrastive_loss"] / 4, rel=2e-3)
    assert quarter["Distill_loss"] == pytest.approx(plain["Distill_loss"], rel=2e-3)


def test_weights_are_those_of_the_pairs(fitted, data, tmp_path, monkeypatch):
    """Live and kept, each pair's text comes with its own weight; no caption comes twice."""
    out, cache = fitted
    every = joined(out / "pair_weights").ravel()
    assert every.std() > 0.2
    captions = [f["txt"].decode() for f in samples(*sorted(data.glob("*.tar"))).values()]
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(captions).float()
    # Of the fitted towers, whose last norm is another: the folder that training makes.
    seen = []

    def record_weights(texts):
        seen.append(split_weights(texts))
        return seen[-1]

    monkeypatch.setattr(student_with_teacher, "split_weights", record_weights)
    words = f"--model local-dir:{out} --loss infonce {LOCKED} --train-data {shards_of(data)}"
    words += f" --pair-weights {out}/fit.json --name"
    for name in ("live", f"kept --feature-cache {cache}"):
        seen.clear()
        train(data, tmp_path, f"{words} {name}")
        texts, weights = (torch.cat(column).float() for column in zip(*seen, strict=True))
        if name != "live":
            newest = max(cache.glob("text-*"), key=lambda folder: folder.stat().st_mtime_ns)
            tokens = torch.from_numpy(joined(newest))
        distances = torch.cdist(texts, tokens)
        nearest = distances.argmin(dim=1)
        assert len(nearest.unique()) > 250 and distances.amin(dim=1).max() < 1e-3
        np.testing.assert_allclose(weights.numpy(), every[nearest.numpy()], atol=2e-6)


def test_init_fit_does_both(model, data, tmp_path):
    words = f"--model local-dir:{model} --loss otter {LOCKED} --train-data {shards_of(data)}"
    words += f" --init fit --lr 0 --feature-cache {tmp_path}/cache --name"
    checkpoints = train(data, tmp_path, f"{words} one")
    (folder,) = (tmp_path / "cache").glob("fit-*")
    stock = open_clip.create_model(f"local-dir:{folder}")
    state = load(checkpoints / "epoch_1.pt")["state_dict"]
    assert torch.equal(state["visual.head.proj.weight"], stock.visual.head.proj.weight)
    params = (tmp_path / "one" / "params.txt").read_text(encoding="utf-8")
    assert f"pair_weights: {folder / 'fit.json'}" in params
    before = (folder / "fit.json").stat().st_mtime_ns
    train(data, tmp_path, f"{words} two")
    assert (folder / "fit.json").stat().st_mtime_ns == before
    # Towers that were written anew in the same place are others.
    os.utime(model / "open_clip_model.safetensors")
    train(data, tmp_path, f"{words} three")
    assert len(list((tmp_path / "cache").glob("fit-*"))) == 2


def test_val_unpaired_and_a_text_mean_that_stays(model, data, labelled, tmp_path, fitted):
    captions = tmp_path / "captions.txt"
    lines = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    captions.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    more = {"unpaired_images": str(data / "00001.tar"), "unpaired_captions": str(captions)}
    more |= {"val": str(labelled), "keep_text_mean": True, "embed_dim": 4}
    out = fit(tmp_path, model, data, fitted, **more)
    said = record(out)
    assert said["embed_dim"] == 4 and 0 < said["val"]["mean_average_precision"] <= 1
    loaded = open_clip.create_model(f"local-dir:{out}")
    before = open_clip.create_model(f"local-dir:{model}")
    norms = [m.text.transformer.encoder.layer[-1].output.LayerNorm.bias for m in (loaded, before)]
    assert torch.equal(*norms)


def test_scale_and_likelihood_are_of_the_setting_of_val(model, data, labelled, tmp_path, fitted):
    said = record(fit(tmp_path, model, data, fitted, val=str(labelled), no_weights=True))
    setting = {"ridge": (said["ridge_images"], said["ridge_texts"]), "power": said["power"]}
    sides = [joined(next(fitted[1].glob(f"{kind}-*"))) for kind in ("image", "text")]
    found = fit_heads(*sides, weights=False, **setting)[2]
    assert said["logit_scale"] == found.logit_scale
    assert said["log_likelihood"] == pytest.approx(found.log_likelihood, rel=1e-6)


def fit(folder, towers, data, fitted, **changes):
    """The folder that the function writes, from what ``fitted`` kept."""
    arguments = {"model": str(towers), "train_data": shards_of(data), "feature_cache": fitted[1]}
    return fit_folder(folder / "out", **{**arguments, "workers": 0, **changes})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "tiny-vit"}, "is not two pretrained towers"),
        ({"train_data": "pairs.csv"}, "is a table"),
        ({"unpaired_images": "x.tar"}, "go together"),
        ({"unpaired_images": "{0}/00000.tar", "unpaired_captions": "{1}/empty"}, "no line"),
        ({"train_data": "/nowhere/0.tar"}, "/nowhere/0.tar"),
        ({"val": "/nowhere"}, "--val"),
        ({"embed_dim": 5000}, "embed_dim is 5000"),
        ({"feature_cache": "{1}/out/features"}, "features lies in"),
        ({"model": "{1}/damaged"}, "--model .*damaged: Error while deserializing"),
    ],
)
def test_what_cannot_be_fitted(change, said, model, data, tmp_path, fitted):
    (tmp_path / "empty").write_text("\n", encoding="utf-8")
    damaged = shutil.copytree(model, tmp_path / "damaged") / "open_clip_model.safetensors"
    os.truncate(damaged, 9999)
    change = {k: v.format(data, tmp_path) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises((ValueError, OSError), match=said):
        fit(tmp_path, model, data, fitted, **change)
    assert not (tmp_path / "out").exists()


def test_what_is_read_or_appears_is_not_replaced(model, data, tmp_path, fitted, monkeypatch):
    with pytest.raises(FileExistsError, match="out lies in"):
        fit_folder(fitted[0], model=str(fitted[0]), train_data=shards_of(data), overwrite=True)
    (tmp_path / "out" / "unknown").mkdir(parents=True)
    monkeypatch.setattr(fitting_run, "check_out", lambda *_: None)  # as if it had come later
    with pytest.raises(FileExistsError, match="is not an exported model"):
        fit(tmp_path, model, data, fitted)
    assert (tmp_path / "out" / "unknown").is_dir()


def test_a_damaged_labelled_picture_is_named(model, data, labelled, tmp_path, fitted):
    bad = damaged(labelled, tmp_path / "bad")
    with pytest.raises(ValueError, match=r"0\.tar(, sample 29:|: sample 0029)"):
        fit(tmp_path, model, data, fitted, val=str(bad))


def test_a_tower_that_cannot_take_the_mean_off(model, data, tmp_path, fitted, monkeypatch):
    def without_biases(towers):
        for module in towers.model.text.transformer.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.bias = None
        return takes_off_a_mean(towers)

    monkeypatch.setattr(fitting_run, "takes_off_a_mean", without_biases)
    with pytest.raises(ValueError, match="pass --keep-text-mean"):
        fit(tmp_path, model, data, fitted)


def test_weights_of_other_shards(fitted, data, tmp_path):
    out, _ = fitted
    moved = shutil.copytree(data, tmp_path / "moved", copy_function=shutil.copyfile)
    words = f"--model local-dir:{out} --loss otter --train-data {shards_of(moved)} --pair-weights"
    with pytest.raises(SystemExit, match=r"has no weights of .*00000\.tar"):
        train(moved, tmp_path, f"{words} {out}/fit.json")
    with pytest.raises(SystemExit, match="has no weights of pairs"):
        train(moved, tmp_path, f"{words} {moved}/sizes.json --name two")
