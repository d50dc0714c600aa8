"""`data inspect`: its figures, its faults, its picture."""

import io
import json

import numpy as np
import pytest
from conftest import npy, write_set
from data_helpers import encoded, jpeg, refused, run, write_tar
from PIL import Image

from otter_openclip.data.contact_sheet import draw
from otter_openclip.shards import read as shard_samples


@pytest.fixture
def shards(tmp_path):
    files = {}
    for n in range(6):
        files |= {f"{n:04d}.jpg": jpeg(n), f"{n:04d}.txt": ("word " * (n + 1)).strip().encode()}
    write_tar(tmp_path / "00000.tar", files)
    grey = {"a.png": encoded(1, "PNG", "L"), "a.txt": "été $x$ 〒".encode(), "a.json": b"{}"}
    write_tar(tmp_path / "00001.tar", grey)
    (tmp_path / "sizes.json").write_text('{"00000.tar": 6, "00001.tar": 1}', encoding="utf-8")
    return tmp_path


def inspect(folder, *extra, shards=""):
    line = ["inspect", folder / shards, "--sheet", folder / "sheet.png"]
    code = run(*line, "--json", folder / "f.json", *extra)
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
    out = capsys.readouterr().out
    assert "7 samples in 2 shards" in out and "No faults" in out
    sheet = (shards / "sheet.png").read_bytes()
    with Image.open(io.BytesIO(sheet)) as drawn:
        assert drawn.width > 1000 and len(drawn.convert("RGB").getcolors(1 << 20)) > 100
    assert inspect(shards, "--workers", "2") == (code, figures)
    assert (shards / "sheet.png").read_bytes() == sheet


def test_a_text_without_spaces_is_drawn(tmp_path):
    draw([(Image.new("RGB", (160, 1), "white"), 30 * "https://x.org/")], tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png").convert("L")
    assert sum(sheet.histogram()[:99]) > 99


def test_every_fault_is_named(shards, capsys):
    Image.fromarray(np.array([[0, 60000], [255, 100]], np.int32)).save(deep := io.BytesIO(), "TIFF")
    bad = {
        **{"cut.jpg": jpeg(1)[:-150], "cut.txt": b"x", "alone.jpg": jpeg(3)},
        **{"blank.jpg": jpeg(2), "blank.txt": b" "},
        **{"deep.png": deep.getvalue(), "deep.txt": b"x"},
        **{"long.jpg": jpeg(5), "long.cls": b"9" * 5000, "minus.jpg": jpeg(5), "minus.cls": b"-1"},
    }
    whole = write_tar(shards / "00001.tar", bad)
    code, figures = inspect(shards)
    assert code == 1 and figures["samples"] == 12
    faults = {(f["shard"][-9:], f["sample"]): f["fault"] for f in figures["faults"]}
    assert faults["00001.tar", "cut"].startswith("unreadable image: image file is truncated")
    assert faults["00001.tar", "blank"] == "empty caption"
    assert faults["00001.tar", "alone"].startswith("neither caption")
    assert "(mode I), which loaders cut off" in faults["00001.tar", "deep"]
    assert faults["00001.tar", "long"] == f"its cls, {b'9' * 20}, is no class's number"
    assert faults["00001.tar", "minus"] == "its cls, b'-1', is no class's number"
    assert len(figures["faults"]) == 6 + 1
    out = capsys.readouterr().out
    assert "cut: unreadable image" in out and "where sizes.json has 1" in out
    whole.write_bytes(whole.read_bytes()[:4000])
    code, figures = inspect(shards)
    assert code == 1 and any("damaged or cut short" in f["fault"] for f in figures["faults"])


def test_zero_shot_sets(tmp_path):
    files = {"a.jpg": jpeg(1), "a.npy": npy([1, 0, 1]), "b.jpg": jpeg(2), "b.npy": npy([0, 1, 0])}
    write_set(tmp_path, [files], ["ball", "bat, big", "Kakigōri"])
    code, figures = inspect(tmp_path)
    assert code == 0 and figures["labels_per_image"]["mean"] == 1.5
    (tmp_path / "test" / "nshards.txt").write_text("2", encoding="utf-8")
    files |= {"b.npy": npy([0] * 3), "c.jpg": jpeg(1), "c.npy": npy([1] * 4), "d.jpg": jpeg(1)}
    write_tar(tmp_path / "test" / "0.tar", files | {"d.npy": b"no"})
    code, figures = inspect(tmp_path)
    faults = {f["sample"]: f["fault"] for f in figures["faults"]}
    assert code == 1 and list(faults) == ["c", "d", ""]
    assert "there are 3 class names" in faults["c"] and "nshards.txt but gone" in faults[""]
    assert "unreadable labels" in faults["d"]
    (remark,) = figures["remarks"]  # evaluation warns of it too
    assert remark.endswith("0.tar: 1 images with no positive label")


def test_nothing_there_and_an_empty_shard(tmp_path, capsys):
    refused(capsys, run("inspect", tmp_path), "no .tar in it")
    write_tar(tmp_path / "0.tar", {})
    code, figures = inspect(tmp_path)
    assert code == 0 and figures["samples"] == 0 and not (tmp_path / "sheet.png").exists()
    assert f"No image to draw: {tmp_path}/sheet.png is not written." in capsys.readouterr().out


def test_folders_of_tars_and_odd_names(shards):
    """A folder named as a pattern is itself; hidden folders do not count, equal names are no fault."""
    other = shards / "a[1]"
    (other / ".otter-build").mkdir(parents=True)
    (other / ".otter-build" / "half.tar").write_bytes(b"x")
    (other / "notes.txt").write_bytes(b"x")
    (shards / "00000.tar").rename(other / "x.TAR.gz")  # whatever the name says
    (shards / "sizes.json").write_text('{"00001.tar": 1}', encoding="utf-8")
    more = {"a.jpg": jpeg(1), "a.txt": b"x", "b.jpg": jpeg(2), "b.txt": b"x"}
    write_tar(shards / "a1" / "00001.tar", more)
    for folder, figures in (("a[1]", (0, 1, 6)), ("", (0, 3, 9))):
        code, found = inspect(shards, shards=folder)
        assert (code, found["shards"], found["samples"]) == figures and found["faults"] == []


@pytest.mark.parametrize(
    ("text", "file", "fault"),
    [
        ("{broken", "sizes.json", "is not JSON of shard names and numbers"),
        ('{"00000.tar": 6}', "00001.tar", "1 samples, where sizes.json has None"),
        ('{"00000.tar": 6, "00001.tar": 1, "2.tar": 0}', "2.tar", "counted in sizes.json but gone"),
    ],
)
def test_sizes(shards, capsys, text, file, fault):
    (shards / "sizes.json").write_text(text, encoding="utf-8")
    code, figures = inspect(shards)
    (found,) = figures["faults"]
    assert code == 1 and found["shard"] == str(shards / file) and fault in found["fault"]
    assert f"fault: {shards / file}" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["JPEG", ""])
def test_the_sheet_goes_where_it_is_asked_to(shards, suffix, monkeypatch):
    sheet = shards / "new" / "folder" / f"sheet{'.' if suffix else ''}{suffix}"
    words = ["--sheet", sheet, "--pictures", "5", "--json", shards / "also" / "f.json"]
    assert run("inspect", shards, *words) == 0 and (shards / "also" / "f.json").exists()
    assert [path.name for path in sheet.parent.iterdir()] == [sheet.name]
    with Image.open(sheet) as image:
        assert image.format == (suffix or "PNG")
        assert image.width // 176 == 4  # three of the first shard, one of the second
    monkeypatch.chdir(shards)
    assert run("inspect", shards) == 0 and (shards / "contact_sheet.png").exists()


def test_what_cannot_be_written_is_refused_before_reading(shards, capsys, monkeypatch):
    (shards / "folder.png").mkdir()
    monkeypatch.setattr(shard_samples, "samples", None)  # nothing is read
    monkeypatch.chdir(shards)
    refused(capsys, run("inspect", shards, "--sheet", "00000.tar/sheet.png"), "00000.tar/sheet.png")
    for flag in ("--sheet", "--json"):
        status = run("inspect", shards, flag, "folder.png")
        refused(capsys, status, "folder.png is a folder, or not")
