"""What evaluation cannot use of a folder is named, with file, sample and fault."""

import gzip

import numpy as np
import pytest
from clip_benchmark.datasets.builder import build_wds_dataset
from conftest import npy, write_set
from data_helpers import encoded, jpeg, run, write_tar

from otter_openclip import cli
from otter_openclip.evaluation.labelled_images import CheckedShards, ImageError
from otter_openclip.evaluation.validator import Folder, check_webdataset
from otter_openclip.training.launcher import main as train

NAMES = ["ball", "bat, big", "Kakigōri"]
CLASSES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
TYPE, COUNT = "dataset_type.txt", "test/nshards.txt"


def samples(**bad):
    """Three whole samples and, in the second shard, ``bad``: suffix -> content."""
    files = {"0000.jpg": jpeg(0), "0000.npy": npy([1, 0, 1]), "0001.png": encoded(1, "PNG")}
    files |= {"0001.npy": npy([0, 1, 0])}
    last = {"0002.webp": encoded(2, "WEBP"), "0002.npy": npy([0, 0, 1])}
    return [files, last | {f"bad.{suffix}": content for suffix, content in bad.items()}]


@pytest.fixture
def folder(tmp_path):
    """A multi-label webdataset without a fault."""
    return write_set(tmp_path / "set", samples(jpg=jpeg(3), npy=npy([1, 1, 1])), NAMES)


TEXTS = [
    # (file, its content or None for no such file, fault)
    (CLASSES, None, "is missing; write one class a line"),
    (CLASSES, b"ball\n \nbat\n", "line 2: empty class name"),
    (CLASSES, "ball\na\u2028b\nc\n".encode(), r"line 2: 'a\u2028b' holds a line break (U+2028)"),
    (CLASSES, "ball\nété\nc".encode("latin-1"), "cannot be read as UTF-8 text"),
    (CLASSES, "\ufeffball\nbat\nc".encode(), "line 1 begins with a byte order mark"),
    (TEMPLATES, None, "is missing; write 'a photo of {c}.' into it"),
    (TEMPLATES, b"a {c}\na photo\n", "line 2: 'a photo' is no template (no {c} in it)"),
    (TEMPLATES, b" \n\n", "is empty; give one template a line"),
    (TYPE, b"multi-label", "'multi-label' is no type of data set; write multilabel, retrieval or"),
    (COUNT, b"two", "'two' is no number of shards; write how many there are"),
    (COUNT, b"4", "2 of 4 shards are missing, first {folder}/test/2.tar"),
]
SAMPLES = [
    # (what the sample has beside jpg and npy, or instead, fault)
    ({"npy": None}, "no npy with its label vector"),
    ({"npy": npy([1, 0])}, "label vector of shape (2,), but there are 3 class names"),
    ({"npy": npy([0, 0.7, 1], dtype=float)}, "values other than 0 and 1, e.g. 0.7"),
    ({"npy": npy(["x", {}, 1], dtype=object)}, "the npy cannot be read (unreadable labels"),
    ({"npy": npy([b"1", b"0", b"1"], dtype="V1")}, "label vector of |V1, where numbers are due"),
    ({"jpg": None}, "no image (jpg, png, webp, jpeg) among its files"),
    ({"jpg": b"no image"}, "unreadable image: not an image that Pillow can read"),
    ({"jpg": jpeg(5, (90, 80))[:-200]}, "unreadable image: image file is truncated"),
    ({"jpg": None, "webp": encoded(5, "WEBP")[:-9]}, "unreadable image: "),
    ({"jpg": None, "png": encoded(5, "PNG").replace(b"IDAT", b"IDAT\0")}, "unreadable image: "),
    ({"jpg": None, "png": encoded(5, "TIFF", "F")}, "image (mode F), which loaders cut off at 0"),
]
SHARDS = [
    # (from the shard's bytes to others, fault)
    (lambda tar: tar.replace(b"bad.npy", b"bed.npy"), "no header and no end at byte"),
    (lambda tar: b"", "cannot be read to its end: damaged or cut short (empty file)"),
    (lambda tar: gzip.compress(tar)[:999], "cannot be read to its end: damaged or cut short"),
    (lambda tar: tar + tar, "(behind its end more follows, another tar perhaps, which is"),
    (lambda tar: tar[: 512 * (len(tar.rstrip(b"\0")) // 512 + 1)], "no header and no end at byte"),
]


@pytest.mark.parametrize(("file", "content", "text"), TEXTS)
def test_text_files(folder, file, content, text):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"^here {folder} cannot be used: {folder / file}") as stop:
        check_webdataset(str(folder), flag="here")
    assert text.replace("{folder}", str(folder)) in str(stop.value)


def read(folder, **needed):
    """Check the folder, then every sample, as before a training run."""
    check_webdataset(str(folder), **needed)
    shards = CheckedShards(build_wds_dataset("made", None, "test", str(folder)))
    list(shards({"url": url} for url in shards.urls))


def refused(folder, place, text, **needed):
    with pytest.raises(ImageError) as stop:
        read(folder, **needed)
    assert str(stop.value).startswith(f"{folder}/test/{place}: ") and text in str(stop.value)


@pytest.mark.parametrize(("changed", "text"), SAMPLES)
def test_samples(folder, changed, text):
    files = {"jpg": jpeg(3), "npy": npy([1, 1, 1])} | changed
    files = {suffix: content for suffix, content in files.items() if content is not None}
    write_set(folder, samples(**files), NAMES)
    refused(folder, "1.tar: sample bad", text)


@pytest.mark.parametrize(("change", "text"), SHARDS)
def test_shards(folder, change, text):
    shard = folder / "test" / "1.tar"
    shard.write_bytes(change(shard.read_bytes()))
    refused(folder, "1.tar", text)


def test_a_name_twice_in_a_row(folder):
    write_set(folder, samples(JPG=jpeg(4), jpg=jpeg(3), npy=npy([1, 1, 1])), NAMES)
    refused(folder, "1.tar", "bad.jpg comes twice in a row, where clip_benchmark stops")


@pytest.mark.parametrize(
    ("kind", "files", "text"),
    [
        ("classification", {"1.cls": b"3"}, "its cls, b'3', is none of the 3 classes"),
        ("classification", {}, "no cls with its label"),
        ("classification", {"1.npy": npy([1, 0, 0])}, "; as it has npy, write multilabel into"),
        ("Retrieval\n", {}, "no txt"),
        ("Retrieval\n", {"1.txt": b"\xe9"}, "caption is not UTF-8"),
    ],
)
def test_single_labels_and_captions(folder, kind, files, text):
    (folder / TYPE).write_text(kind, encoding="utf-8")
    first = {"0.jpg": jpeg(0), "0.cls": b"2", "0.txt": b"a", "1.jpg": jpeg(1)}
    write_tar(folder / "test" / "0.tar", first | files)
    refused(folder, "0.tar: sample 1", text, names=kind == "classification")


def test_retrieval_sets_need_no_names(folder):
    (folder / TYPE).write_text("Retrieval\n", encoding="utf-8")
    (folder / CLASSES).unlink()
    (folder / TEMPLATES).unlink()
    assert Folder(folder).faults == []
    with pytest.raises(ValueError, match=r"is for retrieval by its dataset_type\.txt; labels"):
        check_webdataset(str(folder))


@pytest.mark.parametrize(
    "changed",
    [
        {"npy": npy([True, False, True], dtype=bool)},
        {"npy": npy([0, 0, 0], dtype=np.float32)},
        {"jpg": jpeg(3) + b"what some cameras append"},
        {"JPEG": jpeg(3), "jpg": b"not looked at, as there is a png", "png": encoded(5, "PNG")},
        {"jpg": encoded(3, "PNG", "LA"), "json": b"{}"},
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_what_can_be_used(folder, caplog, changed, compress):
    write_set(folder, samples(**{"jpg": jpeg(3), "npy": npy([1, 1, 1])} | changed), NAMES)
    shard = folder / "test" / "1.tar"
    shard.write_bytes(compress(shard.read_bytes()))
    (folder / CLASSES).write_bytes(b"ball\r\nbat\r\nball")
    (folder / TEMPLATES).write_text("\na {c}\n\n", encoding="utf-8")
    (folder / "test" / "7.tar").write_bytes(shard.read_bytes())
    read(folder)
    assert "1 names stand for several classes" in caplog.text
    assert "1 further shards are not read, first 7.tar" in caplog.text


def test_every_way_in_refuses_a_folder_in_the_same_words(folder, capsys):
    """``data inspect``, ``eval`` and ``--zeroshot-data``; the last two say which flag it was."""
    (folder / TEMPLATES).write_text("a photo", encoding="utf-8")
    fault = f"{folder / TEMPLATES}: line 1: 'a photo' is no template (no {{c}} in it)"
    assert run("inspect", folder, "--sheet", folder.parent / "s.png") == 1
    assert f"fault: {fault}" in capsys.readouterr().out
    line = ["eval", "--model", "tiny-rn", "--pretrained", "", "--dataset", "wds/made"]
    line += ["--dataset_root", str(folder), "--output", str(folder / "never.json")]
    assert cli.main(line) == 2 and not (folder / "never.json").exists()
    assert f"--dataset_root {folder} cannot be used: {fault}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        train(["--model", "tiny-rn", "--train-data", "nowhere", "--zeroshot-data", str(folder)])
    assert f"--zeroshot-data {folder} cannot be used: {fault}" in capsys.readouterr().err
