"""Texts that are equal once they are cut off at the context: counted, and said before the work."""

import json
import shutil

import open_clip
import pytest
from conftest import CLASSES
from data_helpers import jpeg, write_tar
from training_helpers import train

from otter_openclip import cli
from otter_openclip.captions import cut_alike
from otter_openclip.shards import read

# As long as the tests' context, and longer.
LONG = "red green blue black orange purple circle square "
CUT = "are equal to another once they are cut off at the context's 8 tokens"


@pytest.mark.parametrize("model", ["tiny-rn", "HF"])
def test_those_that_differ_behind_the_cut_are_counted(hf_model, model):
    tokenizer = open_clip.get_tokenizer(model.replace("HF", hf_model))
    texts = [f"{LONG}line", f"{LONG}circle", f"{LONG}line", "line", "Line"]
    texts.append(LONG.replace("red", "blue"))
    remark = cut_alike("captions", texts, tokenizer)
    assert remark.startswith(f"2 of 5 different captions {CUT}") and "'red green blue" in remark
    for apart in ([], texts[1:2] * 2, texts[3:], ["", "a"]):
        assert cut_alike("captions", apart, tokenizer) is None


def test_one_without_spaces_is_named():
    texts = [30 * "https://x.org/" + end for end in "ab"]
    assert "'https://x.org" in cut_alike("captions", texts, open_clip.get_tokenizer("tiny-rn"))


def pairs_alike(folder, count=24):
    """Pairs of which all captions are cut alike, but for two, as shards and as a table."""
    folder.mkdir()
    captions = ["red circle", "blue line", *(f"{LONG}{n}" for n in range(count - 2))]
    files = {f"{n:04d}.jpg": jpeg(n) for n in range(count)}
    texts = {f"{n:04d}.txt": text.encode() for n, text in enumerate(captions)}
    write_tar(folder / "0.tar", dict(sorted((files | texts).items())))
    (folder / "sizes.json").write_text(json.dumps({"0.tar": count}), encoding="utf-8")
    rows = ["filepath\ttitle"]
    for (name, content), text in zip(files.items(), captions, strict=True):
        (folder / name).write_bytes(content)
        rows.append(f"{folder / name}\t{text}")
    (folder / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "0.tar",
        "t.csv --loss clip --precision fp32",
        "0.tar --feature-cache f --lock-image --model tiny-timm",
    ],
)
def test_train_says_it_before_the_first_step(tmp_path, caplog, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    data = f"--loss otter --epochs 1 --train-data {pairs_alike(tmp_path / 'data')}/{words}"
    train(tmp_path, tmp_path / "logs", data)
    said = f"22 of 24 different captions {CUT}"
    assert caplog.text.index(said) < caplog.text.index("Train Epoch")
    assert caplog.text.count(CUT) == 1


def test_each_folders_first_captions_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "CAPTIONS_LOOKED_AT", 3)
    one, other = (pairs_alike(tmp_path / name, 4) / "0.tar" for name in "ab")
    (tmp_path / "b" / "1.tar").write_bytes(one.read_bytes()[:5000])
    shards = [one, tmp_path / "b" / "1.tar", other, "pipe:cat 2.tar"]
    first = ["red circle", "blue line", f"{LONG}0"]
    found = list(read.first_captions(map(str, shards)))
    assert found == [*first, "red circle", "blue line", "red circle"]


def test_class_names(pairs, labelled, tmp_path, caplog, capsys):
    folder = shutil.copytree(labelled, tmp_path / "set")
    names = "\n".join(LONG + name for name in CLASSES)
    (folder / "classnames.txt").write_text(names, encoding="utf-8")
    words = f"--loss otter --zeroshot-data {labelled} {folder} --epochs 1"
    tower = f"--model tiny-rn --pretrained {train(pairs, tmp_path, words)}/epoch_1.pt"
    said = f"9 of 9 different classes of {folder} {CUT}"
    assert caplog.text.index(said) < caplog.text.index("Train Epoch")
    assert caplog.text.count(CUT) == 1
    caplog.clear()
    words = f"eval {tower} --no_amp --dataset wds/set --dataset_root {folder} --num_workers 0"
    assert cli.main([*words.split(), "--output", str(tmp_path / "r.json")]) == 0
    assert f"9 of 9 different class names {CUT}" in caplog.text
    words = f"analyze {tower} --train-data {pairs_alike(tmp_path / 'data')}/0.tar --batch-sizes 8"
    assert cli.main([*words.split(), "--output", str(tmp_path / "analysis")]) == 0
    assert f"22 of 24 different captions {CUT}" in capsys.readouterr().out
