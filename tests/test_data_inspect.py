"""`data inspect`: its figures, its faults, its picture."""

import io
import json

import numpy as np
import pytest
from data_helpers import encoded, jpeg, run, write_tar
from PIL import Image


def npy(*values):
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, np.uint8))
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    files = {}
    for n in range(6):
        files |= {f"{n:04d}.jpg": jpeg(n), f"{n:04d}.txt": ("word " * (n + 1)).strip().encode()}
    write_tar(tmp_path / "00000.tar", files)
    grey = {"a.png": encoded(1, "PNG", "L"), "a.txt": "été $x$ 〒".encode(), "a.json": b"{}"}
    write_tar(tmp_path / "00001.tar", grey)
    (tmp_path / "sizes.json").write_text('{"00000.tar": 6, "00001.tar": 1}')
    return tmp_path


def inspect(folder, *extra, shards=""):
    line = [
        "inspect",
        folder / shards,
        "--sheet",
        folder / "sheet.png",
        "--json",
        folder / "f.json",
    ]
    code = run(*line, *extra)
    return code, json.loads((folder / "f.json").read_text(encoding="utf-8"))


def test_figures_by_hand(shards, capsys):
    code, figures = inspect(shards, shards="{00000..00001}.tar")
    assert code == 0 and figures["faults"] == []
    assert (figures["samples"], figures["shards"]) == (7, 2)
    words = figures["caption_words"]
    assert (words["min"], words["median"], words["max"]) == (1, 3, 6)
    assert words["mean"] == pytest.approx((1 + 2 + 3 + 4 + 5 + 6 + 3) / 7)
    assert figures["caption_characters"]["max"] == 29
    assert figures["image_width"]["max"] == 24 and figures["image_height"]["min"] == 20
    assert figures["formats"] == {"JPEG RGB": 6, "PNG L": 1}
    out = capsys.readouterr().out
    assert "7 samples in 2 shards" in out and "No faults" in out
    with Image.open(shards / "sheet.png") as sheet:
        assert sheet.width > 1000 and len(sheet.convert("RGB").getcolors(1 << 20)) > 100


def test_the_same_whatever_the_number_of_workers(shards):
    sheet = shards / "sheet.png"
    one, first = inspect(shards), sheet.read_bytes()
    assert inspect(shards, "--workers", "2") == one and sheet.read_bytes() == first


def test_every_fault_is_named(shards, capsys):
    bad = {
        **{"cut.jpg": jpeg(1)[:-150], "cut.txt": b"x"},
        **{"blank.jpg": jpeg(2), "blank.txt": b" "},
        **{"gif.gif": b"GIF", "gif.txt": b"x"},
        **{"alone.jpg": jpeg(3)},
        **{"0003.jpg": jpeg(4), "0003.txt": b"x"},
        **{"latin.jpg": jpeg(4), "latin.txt": b"\xe9"},
    }
    whole = write_tar(shards / "00001.tar", bad)
    code, figures = inspect(shards)
    assert code == 1 and figures["samples"] == 12
    faults = {(f["shard"][-9:], f["sample"]): f["fault"] for f in figures["faults"]}
    assert faults["00001.tar", "cut"].startswith("unreadable image: image file is truncated")
    assert faults["00001.tar", "blank"] == "empty caption"
    assert faults["00001.tar", "gif"].startswith("no image (jpg, png, webp, jpeg)")
    assert faults["00001.tar", "alone"].startswith("neither caption")
    assert faults["00001.tar", "latin"] == "caption is not UTF-8"
    assert faults["00000.tar", ""] == "1 samples whose key occurs more than once"
    assert len(figures["faults"]) == 5 + 2 + 1
    out = capsys.readouterr().out
    assert "cut: unreadable image" in out and "where sizes.json has 1" in out
    whole.write_bytes(whole.read_bytes()[:4000])
    code, figures = inspect(shards)
    assert code == 1 and any("damaged or cut short" in f["fault"] for f in figures["faults"])


def test_zero_shot_sets(tmp_path):
    (tmp_path / "classnames.txt").write_text("ball\nbat, big\nKakigōri\n", encoding="utf-8")
    files = {"a.jpg": jpeg(1), "a.npy": npy(1, 0, 1), "b.jpg": jpeg(2), "b.npy": npy(0, 1, 0)}
    write_tar(tmp_path / "test" / "0.tar", files)
    (tmp_path / "test" / "nshards.txt").write_text("1")
    code, figures = inspect(tmp_path)
    assert code == 0 and figures["labels_per_image"]["mean"] == 1.5
    assert figures["classes_with_an_image"] == 3
    (tmp_path / "test" / "nshards.txt").write_text("2")
    files |= {"b.npy": npy(0, 0, 0), "c.jpg": jpeg(1), "c.npy": npy(0, 0, 0, 1), "d.jpg": jpeg(1)}
    write_tar(tmp_path / "test" / "0.tar", files | {"d.npy": b"no"})
    code, figures = inspect(tmp_path)
    faults = " | ".join(f["fault"] for f in figures["faults"])
    assert code == 1 and len(figures["faults"]) == 4
    for part in (
        "no positive label",
        "classnames.txt has 3",
        "nshards.txt but gone",
        "unreadable la",
    ):
        assert part in faults


def test_nothing_there_and_an_empty_shard(tmp_path, capsys):
    assert run("inspect", tmp_path) == 2
    assert "no .tar in it" in capsys.readouterr().err
    write_tar(tmp_path / "0.tar", {})
    code, figures = inspect(tmp_path)
    assert code == 0 and figures["samples"] == 0 and not (tmp_path / "sheet.png").exists()
