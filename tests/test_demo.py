"""The demo: its data, its metric, and one quick run of the whole chain."""

import json
import random
import unicodedata

import numpy as np
import pytest
import webdataset
from PIL import Image

from otter_openclip import cli
from otter_openclip.demo import dataset, glyphs
from otter_openclip.demo.pipeline import _empty_folder, blind_flat_hit
from otter_openclip.demo.report import strongest_block


def test_the_sixteen_faces():
    faces = glyphs.faces()
    assert len(faces) == 16 and dataset.HELD_OUT_FACE in faces
    assert sum(face.startswith("STIX") for face in faces) == 4
    pictures = sum(len(glyphs.characters(face)) for face in faces)
    assert pictures > 50_000


def test_a_glyph_is_dark_on_white_and_not_cut():
    image = np.asarray(glyphs.render(glyphs.Glyph("DejaVuSans", "g")))
    assert image.shape == (32, 32, 3) and image.min() < 50
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
    split = dataset.split_glyphs(random.Random(0), train=30, test=20)
    dataset.write_training_shards(split.train, tmp_path / "train", random.Random(0))
    sizes = json.loads((tmp_path / "train" / "sizes.json").read_text())
    assert sum(sizes.values()) == 30 and len(sizes) == dataset.SHARDS
    names = {glyph.name for glyph, _ in split.train}
    for shard, count in sizes.items():
        samples = list(
            webdataset.WebDataset(str(tmp_path / "train" / shard), shardshuffle=False).decode("pil")
        )
        assert len(samples) == count
        assert all(sample["png"].size == (32, 32) for sample in samples)
        assert all(
            any(set(sample["txt"].split()) <= set(name.split()) for name in names)
            for sample in samples
        )
    for words in (True, False):
        folder = tmp_path / str(words)
        classes, labels = dataset.write_test_set(split.unseen_characters, folder, words=words)
        assert (folder / "classnames.txt").read_text().splitlines() == classes
        samples = webdataset.WebDataset(str(folder / "test" / "0.tar"), shardshuffle=False).decode()
        for sample, (glyph, _), row in zip(samples, split.unseen_characters, labels, strict=True):
            true = {classes[i] for i in np.flatnonzero(row)}
            name = unicodedata.name(glyph.character).lower()
            assert true == (set(name.split()) if words else {name})
            assert np.array_equal(sample["npy"], row)


def test_blind_guesses_by_hand():
    labels = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]], dtype=np.uint8)
    assert [blind_flat_hit(labels, k) for k in (1, 2, 3)] == [0.75, 0.75, 1.0]


def test_strongest_block_finds_the_matching_pairs():
    targets = np.full((20, 20), 0.01)
    group = [3, 8, 15]
    targets[np.ix_(group, group)] = 0.4
    np.fill_diagonal(targets, 0)
    assert set(strongest_block(targets, 3)) == set(group)


def test_quick_run_of_the_whole_chain(tmp_path, capsys):
    output = tmp_path / "demo"
    assert cli.main(["demo", "--quick", "--output", str(output), "--seed", "3"]) == 0
    out = capsys.readouterr().out
    report = json.loads((output / "demo.json").read_text())
    assert report["seed"] == 3 and report["blind_flat_hit"].keys() == (
        report["methods"]["otter"]["flat_hit"].keys()
    )
    assert "--sinkhorn-lambda 0.15" in report["commands"]["otter"]
    assert report["methods"].keys() == {"infonce", "otter"}
    for loss, row in report["methods"].items():
        assert len(row["flat_hit"]) == 12 and len(row["mean_average_precision"]) == 2
        for test in ("unseen_characters-words", "unseen_face-names"):
            rates = [row["flat_hit"][f"{test}@{k}"] for k in (1, 5, 10)]
            assert 0 <= rates[0] <= rates[1] <= rates[2] <= 1
        assert all(0 < value < 1 for value in row["mean_average_precision"].values())
        assert f"{100 * row['flat_hit']['unseen_characters-words@10']:.1f}" in out, loss
    with Image.open(output / "demo.png") as picture:
        assert picture.width > 1000
    assert (output / "exports" / "otter-teacher" / "open_clip_model.safetensors").is_file()


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert cli.main(["demo", "--quick", "--output", str(tmp_path)]) == 2
    assert "was not written by the demo; choose another folder" in capsys.readouterr().err
    assert cli.main(["demo", "--quick", "--seed", "-1", "--output", str(tmp_path / "new")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_rerun_replaces_the_demo_and_nothing_else(tmp_path):
    for name in ("otter-demo-settings.json", "demo.json", "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / "data").mkdir()
    _empty_folder(tmp_path, {"seed": 0})
    assert {path.name for path in tmp_path.iterdir()} == {"otter-demo-settings.json", "notes.md"}


def test_a_settings_file_of_another_program_does_not_make_a_folder_ours(tmp_path):
    (tmp_path / "settings.json").touch()
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="was not written by the demo"):
        _empty_folder(tmp_path, {"seed": 0})
    assert (tmp_path / "data").is_dir()


@pytest.mark.parametrize("command", [["--help"], ["export", "--help"], ["demo", "--help"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 0 and "usage: otter-openclip" in capsys.readouterr().out
