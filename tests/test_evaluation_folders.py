"""What evaluation cannot use is refused on every way in, before a model is loaded, in the same words."""

import gzip
import io
import json

import numpy as np
import pytest
from data_helpers import encoded, jpeg, run, write_tar
from PIL import Image

from otter_openclip import cli
from otter_openclip.evaluation import folders, prompts
from otter_openclip.training.launcher import main as train

NAMES = ["ball", "bat, big", "Kakigōri"]
CLASSES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
TYPE, COUNT = "dataset_type.txt", "test/nshards.txt"


def npy(*values, dtype=np.uint8):
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, dtype))
    return buffer.getvalue()


def picture(mode, dtype, values, format_name="PNG"):
    buffer = io.BytesIO()
    image = Image.fromarray(np.array(values, dtype).reshape(2, -1))
    assert image.mode == mode
    image.save(buffer, format_name)
    return buffer.getvalue()


def samples(**bad):
    """Three whole samples and, in the second shard, ``bad``: suffix -> content."""
    files = {"0000.jpg": jpeg(0), "0000.npy": npy(1, 0, 1), "0001.png": encoded(1, "PNG")}
    files |= {"0001.npy": npy(0, 1, 0)}
    last = {"0002.webp": encoded(2, "WEBP"), "0002.npy": npy(0, 0, 1)}
    return [files, last | {f"bad.{suffix}": content for suffix, content in bad.items()}]


@pytest.fixture
def folder(tmp_path):
    """A multi-label webdataset without a fault."""
    folder = tmp_path / "set"
    write(folder, **{"jpg": jpeg(3), "npy": npy(1, 1, 1)})
    (folder / CLASSES).write_text("".join(f"{name}\n" for name in NAMES), encoding="utf-8")
    (folder / TEMPLATES).write_text("a photo of {c}.\n")
    (folder / TYPE).write_text("multilabel\n")
    (folder / COUNT).write_text("2\n")
    return folder


def write(folder, **bad):
    for number, files in enumerate(samples(**bad)):
        write_tar(folder / "test" / f"{number}.tar", files)


def inspected(folder, *extra):
    """Exit code and what ``--json`` gives."""
    found = folder.parent / "f.json"
    code = run("inspect", folder, "--sheet", folder.parent / "s.png", "--json", found, *extra)
    return code, json.loads(found.read_text(encoding="utf-8"))


def evaluated(folder, task="zeroshot_classification", *extra):
    """Exit code of ``eval`` with a model that is nowhere."""
    line = ["eval", "--model", f"local-dir:{folder}/nowhere", "--pretrained", "", "--task", task]
    line += ["--dataset", "wds/made", "--dataset_root", str(folder), "--output", "never.json"]
    return cli.main([*line, "--num_workers", "0", *extra])


def trained(folder):
    """Exit code of training on nothing with ``--zeroshot-data``."""
    with pytest.raises(SystemExit) as stop:
        train(["--model", "tiny-rn", "--train-data", "nowhere", "--zeroshot-data", str(folder)])
    return stop.value.code


WHOLE = {"jpg": jpeg(5, (90, 80)), "png": encoded(5, "PNG"), "webp": encoded(5, "WEBP")}
RAMP = [0, 100, 200, 255, 256, 1000, 40000, 65535]
TEXTS = [
    # (file, its content or None for no such file, fault)
    (CLASSES, None, "is missing; write one class a line"),
    (CLASSES, b"ball\n \nbat\n", "line 2: empty class name"),
    (CLASSES, b"", "line 1: empty class name"),
    (CLASSES, "ball\na\u2028b\nc\n".encode(), r"line 2: 'a\u2028b' holds a line break (U+2028)"),
    (CLASSES, b"ball\nbat\x0b\nc\n", r"line 2: 'bat\x0b' holds a line break (U+000B)"),
    (CLASSES, "ball\nété\nc".encode("latin-1"), "cannot be read as UTF-8 text"),
    (CLASSES, "\ufeffball\nbat\nc".encode(), "line 1 begins with a byte order mark"),
    (TEMPLATES, None, "is missing; write 'a photo of {c}.' into it"),
    (TEMPLATES, b"a {c}\na photo\n", "line 2: 'a photo' is no template (no {c} in it)"),
    (TEMPLATES, b"a {c}\n{c.x}\n", "line 2: '{c.x}' is no template (another field than {c})"),
    (TEMPLATES, b" \n\n", "is empty; give one template a line"),
    (TYPE, b"multi-label", "'multi-label' is no type of data set; write multilabel, retrieval or"),
    (COUNT, b"two", "'two' is no number of shards; write how many there are"),
    *((COUNT, text, f"{text.decode()!r} is no number") for text in (b"0", b"-2", b"2.0", b"")),
    (COUNT, b"4", "2 of 4 shards are missing, first {folder}/test/2.tar"),
]
SAMPLES = [
    # (what the sample has beside jpg and npy, or instead, fault)
    ({"npy": None}, "no npy with its label vector"),
    ({"npy": npy(1, 0)}, "label vector of shape (2,), but there are 3 class names"),
    ({"npy": npy([1, 0, 1])}, "label vector of shape (1, 3), but there are 3"),
    ({"npy": npy(0, 0.7, 1, dtype=float)}, "values other than 0 and 1, e.g. 0.7"),
    ({"npy": npy(0, 2, 1)}, "values other than 0 and 1, e.g. 2"),
    ({"npy": npy(0, -1, 1, dtype=int)}, "values other than 0 and 1, e.g. -1"),
    ({"npy": npy(0, np.nan, 1, dtype=float)}, "values other than 0 and 1, e.g. nan"),
    ({"npy": npy(1, 0, 1)[:-1]}, "the npy cannot be read (unreadable labels"),
    ({"npy": npy("x", {}, 1, dtype=object)}, "the npy cannot be read (unreadable labels"),
    ({"npy": b"PK\x03\x04"}, "the npy cannot be read (unreadable labels"),
    ({"npy": npy(b"1", b"0", b"1", dtype="V1")}, "label vector of |V1, where numbers are due"),
    ({"npy": npy("1", "0", "1", dtype=str)}, "label vector of <U1, where numbers are due"),
    ({"jpg": None}, "no image (jpg, png, webp, jpeg) among its files"),
    ({"jpg": b""}, "unreadable image: empty file"),
    ({"jpg": b"no image"}, "unreadable image: not an image that Pillow can read"),
    ({"jpg": WHOLE["jpg"][:-200]}, "unreadable image: image file is truncated"),
    ({"jpg": jpeg(3)[:-2]}, "unreadable image: image file is truncated"),
    ({"jpg": None, "png": WHOLE["png"][:-60]}, "unreadable image: image file is truncated"),
    ({"jpg": None, "webp": WHOLE["webp"][:-9]}, "unreadable image: "),
    (
        {"jpg": None, "png": picture("I;16", np.uint16, RAMP)},
        "), which loaders cut off at 0 and 255: 62% of it is white then, 12% black",
    ),
    (
        {"jpg": None, "png": picture("F", np.float32, np.linspace(0, 1, 8), "TIFF")},
        "image (mode F), which loaders cut off at 0 and 255: 0% of it is white then, 88% black",
    ),
    ({"jpg": None, "png": picture("I", np.int32, [-5, 7, 300, 9], "TIFF")}, "25% of it is white"),
]
SHARDS = [
    # (from the shard's bytes to others, fault)
    (lambda tar: tar[:2000], "cannot be read to its end: damaged or cut short"),
    (lambda tar: tar.replace(b"bad.npy", b"bed.npy"), "no header and no end at byte"),
    (lambda tar: b"", "cannot be read to its end: damaged or cut short (empty file)"),
    (lambda tar: gzip.compress(tar)[:999], "cannot be read to its end: damaged or cut short"),
    (
        lambda tar: tar + tar,
        "(behind its end more follows, another tar perhaps, which is not read)",
    ),
    (lambda tar: gzip.compress(tar + tar), "(behind its end more follows"),
    (lambda tar: b"x" * 9999, "cannot be read to its end: damaged or cut short"),
    (lambda tar: tar[: 512 * (len(tar.rstrip(b"\0")) // 512 + 1)], "no header and no end at byte"),
]


def refused(folder, capsys, file, sample, text):
    """``inspect``, ``eval`` and ``--zeroshot-data`` name the one fault of ``file``."""
    code, found = inspected(folder)
    (fault,) = (fault for fault in found["faults"] if fault["shard"] == str(file))
    assert (code, fault["sample"]) == (1, sample) and text in fault["fault"]
    said = capsys.readouterr().out
    assert f"fault: {file}" in said and fault["fault"] in said and "No faults" not in said
    for way in (evaluated, trained):
        assert way(folder) == 2
        said = capsys.readouterr().err
        text = fault["fault"].replace("is missing; ", "")  # where eval also names its flag
        assert str(file) in said and text in said and f"sample {sample}" * bool(sample) in said


@pytest.mark.parametrize(("file", "content", "text"), TEXTS)
def test_text_files(folder, capsys, file, content, text):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    refused(folder, capsys, folder / file, "", text.replace("{folder}", str(folder)))


@pytest.mark.parametrize(("changed", "text"), SAMPLES)
def test_samples(folder, capsys, changed, text):
    files = {"jpg": jpeg(3), "npy": npy(1, 1, 1)} | changed
    write(folder, **{suffix: content for suffix, content in files.items() if content is not None})
    refused(folder, capsys, folder / "test" / "1.tar", "bad", text)


@pytest.mark.parametrize(("change", "text"), SHARDS)
def test_shards(folder, capsys, change, text):
    shard = folder / "test" / "1.tar"
    shard.write_bytes(change(shard.read_bytes()))
    refused(folder, capsys, shard, "", text)


def test_a_name_twice_in_a_row(folder, capsys):
    write(folder, JPG=jpeg(4), jpg=jpeg(3), npy=npy(1, 1, 1))
    shard = folder / "test" / "1.tar"
    refused(folder, capsys, shard, "", "bad.jpg comes twice in a row, where clip_benchmark stops")


def test_no_samples(folder, capsys):
    for number in range(2):
        write_tar(folder / "test" / f"{number}.tar", {})
    refused(folder, capsys, folder / "test", "", "no images in 2 shards, first")


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (b"3", "its cls, b'3', is none of the 3 classes"),
        (b"-1", "its cls, b'-1', is none of"),
        (b"1.0", "its cls, b'1.0', is none of"),
        (b"9" * 5000, f"its cls, b'{'9' * 20}', is none of"),
        (None, "no cls with its label"),
        ("npy", "no cls with its label; as it has npy, write multilabel into dataset_type.txt"),
    ],
)
@pytest.mark.parametrize("kind", ["classification", None])
def test_single_labels(folder, capsys, cls, text, kind):
    (folder / TYPE).unlink()
    if kind:
        (folder / TYPE).write_text(kind)
    first = {"0.jpg": jpeg(0), "0.cls": b"2", "1.jpg": jpeg(1)}
    first |= {None: {}, "npy": {"1.npy": npy(1, 0, 0)}}.get(cls, {"1.cls": cls})
    write_tar(folder / "test" / "0.tar", first)
    write_tar(folder / "test" / "1.tar", {})
    code, found = inspected(folder)
    assert code == 1 and found["faults"][0]["fault"].startswith(text)
    assert evaluated(folder) == 2 and f"0.tar: sample 1{'' if text[0] == 'i' else ' has'}" in (
        said := capsys.readouterr().err
    )
    assert text in said
    assert trained(folder) == 2
    assert "a set with single labels by its dataset_type.txt; label vectors are needed" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [(None, "no txt"), (b" \n", "empty caption"), (b"\xe9", "caption is not UTF-8")],
)
def test_retrieval_sets_need_no_names(folder, capsys, text, fault):
    (folder / TYPE).write_text("Retrieval\n")
    (folder / CLASSES).unlink()
    (folder / TEMPLATES).unlink()
    files = {"0.jpg": jpeg(0), "0.txt": b"a ball\na bat"}
    write_tar(folder / "test" / "0.tar", files)
    write_tar(folder / "test" / "1.tar", {})
    assert inspected(folder)[0] == 0
    write_tar(folder / "test" / "1.tar", {"1.jpg": jpeg(1)} | ({"1.txt": text} if text else {}))
    code, found = inspected(folder)
    assert code == 1 and found["faults"][0]["fault"].startswith(fault)
    assert evaluated(folder, "zeroshot_retrieval") == 2
    said = capsys.readouterr().err
    assert f"1.tar: sample 1{' has' if fault == 'no txt' else ':'} {fault}" in said
    (folder / CLASSES).write_text("a")
    (folder / TEMPLATES).write_text("{c}")
    assert evaluated(folder) == 2
    assert "captions by its dataset_type.txt; label vectors or single labels are needed" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"npy": npy(True, False, True, dtype=bool)},
        {"npy": npy(1, 0, 1, dtype=np.float32)},
        {"npy": npy(0, 0, 0)},
        {"jpg": jpeg(3) + b"what some cameras append"},
        {"JPEG": jpeg(3), "jpg": b"not looked at, as there is a png", "png": WHOLE["png"]},
        {"jpg": encoded(3, "PNG", "LA"), "json": b"{}"},
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_what_can_be_used(folder, caplog, changed, compress):
    write(folder, **{"jpg": jpeg(3), "npy": npy(1, 1, 1)} | changed)
    shard = folder / "test" / "1.tar"
    shard.write_bytes(compress(shard.read_bytes()))
    (folder / CLASSES).write_bytes(b"ball\r\nbat\r\nball")
    (folder / TEMPLATES).write_text("\na {c}\n\n")
    (folder / "test" / "7.tar").write_bytes(shard.read_bytes())
    code, found = inspected(folder)
    assert code == 0 and found["faults"] == [] and found["samples"] == 6
    said = " | ".join(found["remarks"])
    for remark in ("1 names stand for several classes", "1 further shards are not read, first 7"):
        assert remark in said
    assert ("1.tar: 1 images with no positive label" in said) == (changed == {"npy": npy(0, 0, 0)})
    assert folders.check_webdataset(str(folder), flag="here", progress=False).classes == 3
    assert "1 names stand for several classes" in caplog.text and "7.tar" in caplog.text


def test_truncated_images_may_be_wanted(folder, capsys):
    write(folder, jpg=WHOLE["jpg"][:-200], npy=npy(1, 1, 1))
    assert evaluated(folder) == 2 and "or pass --load_truncated" in capsys.readouterr().err
    with pytest.raises(Exception, match="nowhere"):
        assert evaluated(folder, "zeroshot_classification", "--load_truncated") == 2
        raise ValueError(capsys.readouterr().err)


def test_names_for_builders():
    with pytest.raises(ValueError, match=r"^a.csv, line 2: 'x\\u2028y' holds a line break"):
        prompts.check_classnames(["a", "x\u2028y"], "a.csv")


@pytest.mark.parametrize("flag", ["--custom_classname_file", "--custom_template_file"])
@pytest.mark.parametrize(
    ("text", "fault"), [("{broken", "cannot be read as JSON"), ("[]", "holds no object")]
)
def test_files_of_ones_own(folder, capsys, tmp_path, flag, text, fault):
    (tmp_path / "own.json").write_text(text)
    assert evaluated(folder, "zeroshot_classification", flag, str(tmp_path / "own.json")) == 2
    assert f"{flag} {tmp_path}/own.json {fault}" in capsys.readouterr().err
