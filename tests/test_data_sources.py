"""Where builders find pictures and captions: exact look-ups, strict tables, columns."""

import gzip
import io
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
from data_helpers import (
    as_file,
    dropped,
    encoded,
    jpeg,
    pack,
    refused,
    run,
    samples,
    write_files,
    write_tar,
)
from forks import ROOT
from PIL import Image
from test_data_train import img2dataset, pairs_of


def table(path, rows):
    lines = ["\t".join(row) for row in (("filepath", "title"), *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def csv(folder, captions, *images):
    """Build pairs of a table that is there, or of the rows of one."""
    if isinstance(captions, list):
        captions = table(folder / "t.tsv", captions)
    words = ["csv", "--captions", captions, "--output", folder / "out", "--no-shuffle"]
    return run(*words, *(["--images", *images] if images else []))


FILES = {"a/0.png": 0, "b/0.png": 1, "a/only.JPG": 2, "top.jpg": 3, "x/a/7.jpg": 4, "x/b/7.jpg": 5}
# Two of whole paths, though others have their names, and two names of one file each.
FOUND = {"a/0.png": 0, "./b/0.png": 1, "only.JPG": 2, "moved/to/top.jpg": 3}
LOST = ["0.png", "c/0.png", "a/7.jpg"]  # the end of a path is not enough
KINDS = ["folder", "tar", "TAR", "tar.gz", "TAR.GZ", "zip", "Zip", "folder of tars", "tar of tars"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_means_that_file_in_folders_tars_and_zips_alike(tmp_path, kind):
    source = pack(kind, tmp_path, {name: jpeg(n) for name, n in FILES.items()})
    rows = [(path, f"picture {n}") for path, n in FOUND.items()]
    rows += [(path, "any") for path in LOST] + [("only.jpg", "case"), ("only", "no suffix")]
    assert csv(tmp_path, rows, source) == 0
    assert pairs_of(tmp_path / "out") == [(f"picture {n}", jpeg(n)) for n in FOUND.values()]
    lost = {(path, "ambiguous") for path in LOST} | {("only.jpg", "missing"), ("only", "missing")}
    assert set(dropped(tmp_path / "out")) == lost
    report = (tmp_path / "out" / "dropped.tsv").read_text(encoding="utf-8")
    assert "a/0.png" in report and "b/0.png" in report  # the candidates
    assert not (tmp_path / "out" / ".otter-build" / "unpacked").exists()


def test_two_sources_with_one_path_are_ambiguous(tmp_path):
    one = write_files(tmp_path / "one", {"0.jpg": jpeg(0), "1.jpg": jpeg(1)})
    two = write_files(tmp_path / "two", {"0.jpg": jpeg(2)})
    tar = write_tar(tmp_path / "three.tar", {"1.jpg": jpeg(3)})
    rows = [("0.jpg", "which"), ("1.jpg", "folders come first")]
    assert csv(tmp_path, rows, one, two, tar) == 0
    assert dropped(tmp_path / "out") == [("0.jpg", "ambiguous")]
    assert pairs_of(tmp_path / "out") == [("folders come first", jpeg(1))]


def test_of_two_names_for_one_file_the_sure_one_stays(tmp_path):
    source = write_files(tmp_path / "s", {"a/1.jpg": jpeg(1), "2.jpg": jpeg(2)})
    rows = [("b/1.jpg", "only its name"), ("a/1.jpg", "its path")]
    rows += [("x/2.jpg", "one"), ("y/2.jpg", "other"), ("x/2.jpg", "third")]
    assert csv(tmp_path, rows, source) == 0
    assert pairs_of(tmp_path / "out") == [("its path", jpeg(1))]
    lost = [("b/1.jpg", "file name of another row")]
    assert dropped(tmp_path / "out") == lost + [(f"{d}/2.jpg", "ambiguous") for d in "xxy"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, capsys):
    source = write_files(tmp_path / "s", {"a/0.jpg": jpeg(0), "b/1.jpg": jpeg(1)})
    scan = os.scandir

    def denied(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    refused(capsys, csv(tmp_path, [("1.jpg", "1")], source), f"Permission denied: '{source}/a'")


def test_a_damaged_member_of_a_zip_is_dropped(tmp_path):
    pictures = [encoded(n, "BMP") for n in range(3)]
    source = pack("zip", tmp_path, {f"{n}.bmp": content for n, content in enumerate(pictures)})
    content = bytearray(source.read_bytes())
    content[content.index(pictures[0]) + 300] ^= 1  # a pixel
    content[content.index(b"1.bmp") + 20] ^= 255  # in a compressed one
    source.write_bytes(content)
    assert csv(tmp_path, [(f"{n}.bmp", str(n)) for n in range(3)], source) == 0
    assert [text for text, _ in pairs_of(tmp_path / "out")] == ["2"]
    assert dropped(tmp_path / "out") == [(f"{n}.bmp", "undecodable") for n in range(2)]


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
@pytest.mark.parametrize("form", ["plain", "quoted", "bom crlf", "gz"])
def test_separator_quotes_and_line_ends_are_found_out(tmp_path, separator, form):
    write_files(tmp_path, {f"{n}.jpg": jpeg(n) for n in range(2)})
    rows = [["n", "title", "filepath"], ["0", 'a 5" pipe', "0.jpg"], ["1", "second", "1.jpg"]]
    if form == "quoted":
        rows[1][1] = "two\nlines, and; more\t"
        rows = [['"' + field.replace('"', '""') + '"' for field in row] for row in rows]
    end = "\r\n" if form == "bom crlf" else "\n"
    content = end.join(separator.join(row) for row in rows).encode()
    content = b"\xef\xbb\xbf" + content if form == "bom crlf" else content
    path = tmp_path / "t.csv"
    path.write_bytes(gzip.compress(content) if form == "gz" else content)
    assert csv(tmp_path, path) == 0
    first = "two\nlines, and; more\t" if form == "quoted" else 'a 5" pipe'
    assert pairs_of(tmp_path / "out") == [(first, jpeg(0)), ("second", jpeg(1))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "t.tsv:1: has no column 'filepath' but no header"),
        (b"filepath\ttitle\ttitle\n", "t.tsv:1: has two 'title'"),
        (b"filepath\ttitle\n0.jpg\ta\n0.jpg\n", "t.tsv:3: 1 fields, the header has 2"),
        (b'filepath\ttitle\n0.jpg\ta\n0.jpg\t"open\n0.jpg\tb\n', "t.tsv:3: unexpected end"),
        (b"filepath\ttitle\n0.jpg\ta\n0.jpg\t\xe9\n", "t.tsv:3: not UTF-8 text (byte 7"),
        (b"filepath\ttitle\r0.jpg\ta\r", "t.tsv:1: a carriage return inside a line"),
        (b'filepath\ttitle\n0.jpg\t"a\n0.jpg\tb"\n', "t.tsv:2: a quoted field goes over rows"),
        (
            b'filepath,title\n0.jpg,"a, or\nb, c"\n0.jpg,"a\n2.jpg,b"\n',
            "t.tsv:4: a quotation mark j",
        ),
    ],
)
def test_a_table_that_is_none_is_an_error_with_its_line(tmp_path, capsys, text, message):
    (tmp_path / "t.tsv").write_bytes(text)
    write_files(tmp_path, {"0.jpg": jpeg(0)})
    refused(capsys, csv(tmp_path, tmp_path / "t.tsv"), message)
    assert not list((tmp_path / "out").glob("*.tar"))


def deep(array, form):
    return as_file(Image.fromarray(array), form)


RAMP = np.arange(480).reshape(20, 24)
DEEP = (RAMP * 130).astype(np.uint16)
ZERO_IS = b"\x06\x01\x03\0\x01\0\0\0"  # a TIFF's tag, before the colour


def twelve_bits(array):
    """A TIFF of 12 bits a pixel, two of them in three bytes."""
    pairs = array.reshape(-1, 2).tolist()
    content = b"".join((a << 12 | b).to_bytes(3, "big") for a, b in pairs)
    tags = {256: 24, 257: 20, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 20, 279: 720}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + content


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (deep(DEEP, "PNG"), DEEP / 257),
        (b"P5 24 20 999\n" + (RAMP * 2).astype(">u2").tobytes(), RAMP * 2 * 255 / 999),
        (deep((RAMP / 480).astype(np.float32), "TIFF"), "F pixels of no stated range"),
        (deep(RAMP.astype(np.int32), "TIFF"), "I pixels of no stated range"),
        (deep(DEEP, "TIFF").replace(ZERO_IS + b"\1", ZERO_IS + b"\0"), 255 - DEEP / 257),
        (twelve_bits(RAMP * 8), RAMP * 8 * 255 / 4095),
        (deep(RAMP.astype(np.uint16), "IM"), "I;16 pixels of no stated range"),
    ],
)
def test_deep_pixels_keep_their_meaning_or_go(tmp_path, content, expected):
    write_files(tmp_path, {"0.x": content, "1.jpg": jpeg(1)})
    assert csv(tmp_path, [("0.x", "deep"), ("1.jpg", "flat")]) == 0
    stored = samples(tmp_path / "out" / "00000.tar")
    if isinstance(expected, str):
        assert stored.keys() == {"000000001"}
        said = (tmp_path / "out" / "dropped.tsv").read_text(encoding="utf-8")
        assert f"0.x\tundecodable\t{expected}" in said
        return
    image = np.asarray(Image.open(io.BytesIO(stored["000000000"]["png"])).convert("RGB"))
    assert np.abs(image - expected[..., None]).max() <= 0.51


def test_orientation_stays_what_open_clip_passes_over(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    content = encoded(3, "JPEG", exif=exif.tobytes())
    write_files(tmp_path, {"0.jpg": content})
    assert csv(tmp_path, [("0.jpg", "turned")]) == 0
    assert pairs_of(tmp_path / "out") == [("turned", content)]
    words = ["csv", "--captions", tmp_path / "t.tsv", "--resize", "10"]
    assert run(*words, "--output", tmp_path / "small") == 0
    ((_, small),) = pairs_of(tmp_path / "small")
    assert Image.open(io.BytesIO(small)).size == (12, 10)  # 24 x 20, not turned


def test_number_of_shards(tmp_path):
    write_files(tmp_path, {f"{n}.jpg": jpeg(n) for n in range(19)})
    path = table(tmp_path / "t.tsv", [(f"{n}.jpg", str(n)) for n in range(19)])
    assert run("csv", "--captions", path, "--output", tmp_path / "out", "--shards", "8") == 0
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_text(encoding="utf-8"))
    assert len(sizes) == 8 and set(sizes.values()) == {2, 3} and sum(sizes.values()) == 19


# img2dataset, Hugging Face ------------------------------------------------------------------------


def parquet(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_img2dataset_in_several_runs_and_forms(tmp_path):
    urls = [f"http://x/{n}" for n in range(6)]
    rows = [({"url": url}, jpeg(n)) for n, url in enumerate(urls)]
    img2dataset(tmp_path / "tars", rows[:2], "webdataset")
    img2dataset(tmp_path / "files", rows[2:], "files")
    (tmp_path / "tars" / "_tmp").mkdir()  # left by a run that was stopped
    path = table(tmp_path / "t.tsv", [(url, str(n)) for n, url in enumerate(urls)])
    words = ["csv", "--captions", path, "--no-shuffle", "--img2dataset", tmp_path / "tars"]
    images = [tmp_path / "files" / "00000", tmp_path / "files" / "00001"]
    assert run(*words, *images, "--output", tmp_path / "out") == 0
    assert pairs_of(tmp_path / "out") == [(str(n), jpeg(n)) for n in range(6)]


def test_img2datasets_other_forms_are_named(tmp_path, capsys):
    """Beside tars, parquet files are statistics; alone they would hold the images."""
    images = write_files(tmp_path / "images", {"00000.parquet": b"PAR1"})
    path = table(tmp_path / "t.tsv", [("http://x/0", "a")])
    words = ["--captions", path, "--img2dataset", images, "--output", tmp_path / "out"]
    refused(capsys, run("csv", *words), "parquet and tfrecord files cannot be read")


def hf(folder, *words, dataset="set", out="out"):
    line = ["hf", "--dataset", folder / dataset, "--output", folder / out]
    return run(*line, "--no-shuffle", *words)


def test_tables_of_images_without_pyarrow(tmp_path, monkeypatch, capsys):
    (tmp_path / "set.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status = hf(tmp_path, dataset="set.parquet")
    refused(capsys, status, "pip install 'otter-openclip[parquet]'")


PICTURES = [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(3)]


def write_arrow(path, rows, file=False):
    """What datasets writes, a stream, or arrow's other form, a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = pyarrow.table(rows)
    with (pyarrow.ipc.new_file if file else pyarrow.ipc.new_stream)(path, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=1)


def test_hugging_face(tmp_path):
    """All captions of a row are samples, and what a row lacks is accounted for."""
    images = [*PICTURES[:2], {"bytes": None, "path": "2.jpg"}, *PICTURES[2:]]
    captions = [["one", "un"], [None, "two"], ["of no picture"], []]
    parquet(tmp_path / "set" / "a" / "train.parquet", {"image": images, "said": captions})
    revision = tmp_path / "set" / "b" / "train.parquet"  # as in the hub's cache
    revision.parent.mkdir()
    revision.symlink_to(tmp_path / "set" / "a" / "train.parquet")
    write_files(tmp_path / "set", {"3.jpg": jpeg(3)})
    plain = {"image": [{"bytes": None, "path": "3.jpg"}], "said": ["three"]}
    parquet(tmp_path / "set" / "z.parquet", plain)
    assert hf(tmp_path, "--text-key", "said") == 0
    pairs = [("one", 0), ("un", 0), ("two", 1), ("three", 3)]
    assert pairs_of(tmp_path / "out") == [(caption, jpeg(n)) for caption, n in pairs]
    lost = {(name[-5:], reason) for name, reason in dropped(tmp_path / "out")}
    assert lost == {("row 1", "empty caption"), ("row 2", "missing"), ("row 3", "empty caption")}


def test_hugging_face_arrow(tmp_path):
    beside = tmp_path / "set" / "train"
    write_arrow(beside / "data-00000-of-00001.arrow", {"image": PICTURES, "text": ["a", "b", "c"]})
    filtered = beside / "cache-0a1b.arrow"  # of Dataset.filter
    write_arrow(filtered, {"image": PICTURES[1:], "text": ["b", "c"]}, file=True)
    expected = [(caption, jpeg(n)) for n, caption in enumerate("abc")]
    assert hf(tmp_path) == 0 and pairs_of(tmp_path / "out") == expected
    assert hf(tmp_path, dataset=filtered, out="named") == 0
    assert pairs_of(tmp_path / "named") == expected[1:]


SPLITS = {  # the table of each split, beside what is none of it
    "hub": {"train": "data/train-00000-of-00001", "validation": "data/validation-00000-of-00001"},
    "folders": {"train": "train/0000", "test": "test/0000", "pool": "pool-00000-of-00001"},
    "names": {"train": "pairs", "validation": "my_val"},
    "own": {"train_sft": "data/train_sft-00000-of-00001", "train": "data/train-00000-of-00001"},
    "cache": {"train": "coco-train-00000-of-00001", "test": "coco-test", "x": "cache-1"},
}


@pytest.mark.parametrize("kind", SPLITS)
def test_of_several_splits_one_is_named(tmp_path, kind, capsys):
    suffix = "arrow" if kind == "cache" else "parquet"
    for n, (split, name) in enumerate(SPLITS[kind].items()):
        path = tmp_path / "set" / f"{name}.{suffix}"
        (write_arrow if suffix == "arrow" else parquet)(path, {"image": [jpeg(n)], "text": [split]})
    named = [split for split in SPLITS[kind] if split != "x"]
    listed = f"set has several splits ({', '.join(sorted(named))}); name yours: --split"
    refused(capsys, hf(tmp_path), listed)
    wrong = f"--split tran: the splits of {tmp_path / 'set'} are"
    refused(capsys, hf(tmp_path, "--split", "tran"), wrong)
    for out, chosen in enumerate((*([name] for name in named), named[:2])):
        assert hf(tmp_path, "--split", *chosen, out=str(out)) == 0
        found = [caption for caption, _ in pairs_of(tmp_path / str(out))]
        assert sorted(found) == sorted(chosen)


def test_of_a_saved_dataset_what_its_indexes_name_is_read(tmp_path, capsys):
    for split, names in (("dev", ("data-00000-of-00001", "old")), ("gone", ("train",))):
        for name in names:
            rows = {"image": [jpeg(1)], "text": [f"{split} {name}"]}
            write_arrow(tmp_path / "set" / split / f"{name}.arrow", rows)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}
    (tmp_path / "set" / "dev" / "state.json").write_text(json.dumps(state), encoding="utf-8")
    index = tmp_path / "set" / "dataset_dict.json"
    index.write_text(json.dumps({"splits": ["dev"]}), encoding="utf-8")
    for out, split in enumerate(([], ["--split", "validation"], ["--split", "dev"])):
        assert hf(tmp_path, *split, out=str(out)) == 0
        assert pairs_of(tmp_path / str(out)) == [("dev data-00000-of-00001", jpeg(1))]
    index.write_text("{", encoding="utf-8")
    refused(capsys, hf(tmp_path), "dataset_dict.json is not what datasets' save_to_disk writes")


@pytest.mark.parametrize("name", ["train-00000-of-00001", "train/0000"])  # here and on the hub
def test_configurations_are_not_mixed(tmp_path, capsys, name):
    for language in ("en", "fr"):
        path = tmp_path / "set" / language / f"{name}.parquet"
        parquet(path, {"image": [jpeg(1)], "text": [language]})
    refused(capsys, hf(tmp_path), "are the same part of two datasets")
    named = [tmp_path / "set" / "en", tmp_path / "set" / "fr"]
    assert run("hf", "--dataset", *named, "--output", tmp_path / "out") == 0
    assert len(pairs_of(tmp_path / "out")) == 2


def test_columns_are_chosen_once_for_all_files(tmp_path, capsys):
    folder = write_files(tmp_path / "set", {"3.jpg": jpeg(3)})
    parquet(folder / "1.parquet", {"thumb": PICTURES[:1], "image": PICTURES[1:2], "text": ["a"]})
    parquet(folder / "2.parquet", {"image": [[jpeg(2)], []], "text": ["b", "of no image"]})
    parquet(folder / "3.parquet", {"image": ["3.jpg"], "text": ["a path"]})
    assert hf(tmp_path, "--image-key", "image") == 0
    assert "Images are in the column 'image', captions in 'text'." in capsys.readouterr().out
    assert pairs_of(tmp_path / "out") == [("a", jpeg(1)), ("b", jpeg(2)), ("a path", jpeg(3))]
    parquet(folder / "3.parquet", {"thumb": [jpeg(3)], "said": ["c"]})
    said = "3.parquet: not one column 'image' but thumb, said; --image-key"
    refused(capsys, hf(tmp_path, "--image-key", "image", out="third"), said)


def test_an_arrow_stream_that_stops(tmp_path, capsys):
    path = tmp_path / "a.arrow"
    write_arrow(path, {"image": PICTURES, "text": ["a", "b", "c"]})
    whole = path.read_bytes()
    file = pyarrow.BufferReader(whole)
    messages = pyarrow.ipc.MessageReader.open_stream(file)
    for _ in range(3):  # the schema and two rows
        messages.read_next_message()
    path.write_bytes(whole[: file.tell()])
    refused(capsys, hf(tmp_path, dataset=path), "a.arrow: damaged or cut short")


TWICE = pyarrow.table([PICTURES[:1], ["a"], ["b"]], ["image", "text", "text"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": PICTURES, "en": ["a"] * 3}, "not one column 'text' but en; --text-key"),
        ({"image": PICTURES, "label": [0, 1, 2]}, "'text' but none of texts among image, label;"),
        ({"image": PICTURES, "text": [0, 1, 2]}, "row 0: no text in 'text', but 0"),
        ({"image": PICTURES, "mask": [b"a"] * 3, "text": ["a"] * 3}, "2 columns of images among"),
        ({"image": [PICTURES[:2]], "text": ["a"]}, "row 0: 2 images in 'image', where one is due"),
        ({"image": [{"bytes": None, "path": "x"}], "text": ["a"]}, "(1 missing); check the input,"),
        (TWICE, "not one column 'text' but text, text; --text-key"),
        (b"PAR1PAR1", "a.parquet: damaged or cut short"),
        (None, "no .parquet or .arrow there"),
    ],
)
def test_hugging_face_files_that_are_refused(tmp_path, capsys, columns, message):
    if isinstance(columns, bytes):
        (tmp_path / "a.parquet").write_bytes(columns)
    elif columns:
        parquet(tmp_path / "a.parquet", columns)
    refused(capsys, hf(tmp_path, dataset=""), message)


def test_without_images_nothing_is_searched(tmp_path, monkeypatch):
    """What else lies in the current folder or beside the table is none of the build's business."""
    here = {"deep/1.jpg": jpeg(1), "broken.tar": b"no tar", "3.jpg": jpeg(3)}
    write_files(tmp_path / "here", here)
    write_tar(tmp_path / "here" / "other.tar", {"0.jpg": jpeg(2), "2.jpg": jpeg(3)})
    write_files(tmp_path / "there", {"0.jpg": jpeg(0), "3.jpg": jpeg(0), "broken.zip": b"no zip"})
    rows = ["image;words", "0.jpg;beside", "1.jpg;deeper", "2.jpg;in an archive"]
    rows += ["3.jpg;as open_clip has it", f"{tmp_path}/there/0.jpg;NA"]
    path = tmp_path / "there" / "t.csv"
    path.write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    words = ["--csv-separator", ";", "--csv-img-key", "image", "--csv-caption-key", "words"]
    words += ["--captions", path, "--output", tmp_path / "out", "--no-shuffle"]
    assert run("csv", *words) == 0
    expected = [("beside", jpeg(0)), ("as open_clip has it", jpeg(3)), ("NA", jpeg(0))]
    assert pairs_of(tmp_path / "out") == expected
    assert dropped(tmp_path / "out") == [("1.jpg", "missing"), ("2.jpg", "missing")]


def test_names_in_utf8_are_found_in_any_locale(tmp_path):
    """Of a table's UTF-8 text and on a disk, where the locale has ASCII alone; and found again."""
    write_files(tmp_path, {"ü.jpg": jpeg(1)})
    (tmp_path / "é.tsv").write_text("filepath\ttitle\nü.jpg\t猫\n", encoding="utf-8")
    line = [sys.executable, "-m", "otter_openclip.cli", "data", "csv", "--workers", "1"]
    line += ["--captions", tmp_path / "é.tsv", "--output", tmp_path / "ö"]
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    for _ in range(2):
        subprocess.run(line, env=os.environ | ascii_only, check=True, cwd=ROOT)
    assert pairs_of(tmp_path / "ö") == [("猫", jpeg(1))]
