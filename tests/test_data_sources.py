"""Where builders find pictures and captions: exact look-ups, strict tables, addresses, columns."""

import contextlib
import functools
import gzip
import http.server
import io
import json
import os
import re
import struct
import sys
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from data_helpers import dropped, encoded, jpeg, run, samples, tree, write_files, write_tar
from PIL import Image
from test_data_train import img2dataset, pairs_of

fsspec = pytest.importorskip("fsspec")


def table(path, rows, header=("filepath", "title")):
    lines = ["\t".join(row) for row in (header, *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pack(kind, folder, files):
    """The same files as a folder, tar or zip."""
    if kind == "folder":
        return write_files(folder / "source", files)
    if kind == "tar":
        return write_tar(folder / "source.tar", {f"./{n}": c for n, c in files.items()})
    with zipfile.ZipFile(folder / "source.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return folder / "source.zip"


def csv(folder, captions, *images, out="out"):
    words = ["csv", "--captions", captions, "--output", folder / out, "--no-shuffle"]
    return run(*words, *(["--images", *images] if images else []))


FILES = {"a/0.png": 0, "b/0.png": 1, "a/only.JPG": 2, "top.jpg": 3, "x/a/7.jpg": 4, "x/b/7.jpg": 5}
FOUND = {
    "a/0.png": 0,  # whole, though another has its name
    "./b/0.png": 1,
    "only.JPG": 2,  # a name of one file
    "moved/to/top.jpg": 3,
}
LOST = ["0.png", "c/0.png", "a/7.jpg"]  # the end of a path is not enough


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_a_path_means_that_file_in_folders_tars_and_zips_alike(tmp_path, kind):
    source = pack(kind, tmp_path, {name: jpeg(n) for name, n in FILES.items()})
    rows = [(path, f"picture {n}") for path, n in FOUND.items()]
    rows += [(path, "any") for path in LOST] + [("only.jpg", "case"), ("only", "no suffix")]
    assert csv(tmp_path, table(tmp_path / "t.tsv", rows), source) == 0
    assert pairs_of(tmp_path / "out") == [(f"picture {n}", jpeg(n)) for n in FOUND.values()]
    lost = {(path, "ambiguous") for path in LOST}
    assert set(dropped(tmp_path / "out")) == lost | {("only.jpg", "missing"), ("only", "missing")}
    report = (tmp_path / "out" / "dropped.tsv").read_text()
    assert "a/0.png" in report and "b/0.png" in report  # the candidates


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_a_stem_is_the_whole_name_but_its_suffix(tmp_path, kind):
    files = {"x/b.PNG": jpeg(0), "a.small.jpg": jpeg(1), "a.txt": b"", "x/a.small.jpg": jpeg(2)}
    files |= {f"b.{n:03d}.jpg": jpeg(1) for n in range(9)} | {"b.txt": b""}
    source = pack(kind, tmp_path, files)
    (tmp_path / "c.csv").write_text("LabelName,DisplayName\n/m/1,Ball\n")
    (tmp_path / "l.csv").write_text("ImageID,LabelName,Confidence\na,/m/1,1\nb,/m/1,1\n")
    words = ["open-images", "--classes", tmp_path / "c.csv", "--labels", tmp_path / "l.csv"]
    words += ["--images", source, "--max-missing", "1", "--output", tmp_path / "out"]
    assert run(*words) == 0
    assert samples(tmp_path / "out" / "test" / "0.tar").keys() == {"b"}
    assert dropped(tmp_path / "out") == [("a", "missing")]


def test_two_sources_with_one_path_are_ambiguous(tmp_path):
    one = write_files(tmp_path / "one", {"0.jpg": jpeg(0), "1.jpg": jpeg(1)})
    two = write_files(tmp_path / "two", {"0.jpg": jpeg(2)})
    tar = write_tar(tmp_path / "three.tar", {"1.jpg": jpeg(3)})
    rows = table(tmp_path / "t.tsv", [("0.jpg", "which"), ("1.jpg", "folders come first")])
    assert csv(tmp_path, rows, one, two, tar) == 0
    assert dropped(tmp_path / "out") == [("0.jpg", "ambiguous")]
    assert pairs_of(tmp_path / "out") == [("folders come first", jpeg(1))]


def test_of_two_names_for_one_file_the_sure_one_stays(tmp_path):
    source = write_files(tmp_path / "s", {"a/1.jpg": jpeg(1), "2.jpg": jpeg(2)})
    rows = [("b/1.jpg", "only its name"), ("a/1.jpg", "its path")]
    rows += [("x/2.jpg", "one"), ("y/2.jpg", "other"), ("x/2.jpg", "third")]
    assert csv(tmp_path, table(tmp_path / "t.tsv", rows), source) == 0
    assert pairs_of(tmp_path / "out") == [("its path", jpeg(1))]
    other = ("b/1.jpg", "file name of another row")
    assert dropped(tmp_path / "out") == [
        other,
        *((f"{d}/2.jpg", "ambiguous") for d in "xxy"),
    ]


def test_several_captions_of_one_path_stay_and_a_repeated_pair_goes(tmp_path):
    source = write_files(tmp_path / "s", {"1.jpg": jpeg(1)})
    rows = [("1.jpg", "one"), ("1.jpg", "two"), ("1.jpg", "one")]
    assert csv(tmp_path, table(tmp_path / "t.tsv", rows), source) == 0
    assert pairs_of(tmp_path / "out") == [("one", jpeg(1)), ("two", jpeg(1))]
    assert dropped(tmp_path / "out") == [("1.jpg", "duplicate")]


def test_two_urls_of_one_file_keep_one(tmp_path):
    write_files(tmp_path, {"training/0_1": jpeg(0)})
    (tmp_path / "cc.tsv").write_text("first\thttp://a\nsecond\thttp://b\n")
    row = "training/0_1\ttraining\timage/jpeg\t1\t200\t{}\n"
    (tmp_path / "r.tsv").write_text(row.format("http://a") + row.format("http://b"))
    words = ["--captions", tmp_path / "cc.tsv", "--report", tmp_path / "r.tsv"]
    assert run("cc3m", *words, "--images", tmp_path, "--output", tmp_path / "out") == 0
    assert pairs_of(tmp_path / "out") == [("first", jpeg(0))]
    assert dropped(tmp_path / "out") == [("http://b", "file name of another URL")]


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("caf\u00e9/\u00fc.jpg", "cafe\u0301/u\u0308.jpg"),  # macOS takes letters apart
        ("u\u0308.jpg", "x/\u00fc.jpg"),
        ("a\\0.jpg", "a/0.jpg"),
        ("C:\\data\\1.jpg", "a/1.jpg"),
    ],
)
def test_a_path_as_another_system_spells_it(tmp_path, kind, row, name):
    source = pack(kind, tmp_path, {name: jpeg(1), "b/0.jpg": jpeg(2)})
    assert csv(tmp_path, table(tmp_path / "t.tsv", [(row, "it")]), source) == 0
    assert pairs_of(tmp_path / "out") == [("it", jpeg(1))]
    # But whose path is spelled so has it.
    rows = table(tmp_path / "t2.tsv", [(row, "it"), (name, "its own")])
    assert csv(tmp_path, rows, source, out="two") == 0
    assert pairs_of(tmp_path / "two") == [("its own", jpeg(1))]
    assert dropped(tmp_path / "two") == [(row, "file name of another row")]


def test_links_on_disk(tmp_path):
    write_files(tmp_path, {"real/a/0.jpg": jpeg(0), "in/1.jpg": jpeg(1), "real/1.jpg": jpeg(3)})
    write_tar(tmp_path / "in" / "a.tar", {"t.jpg": jpeg(2)})
    (tmp_path / "in" / "b.tar").symlink_to("a.tar")  # the same archive, not another
    (tmp_path / "in" / "link").symlink_to(tmp_path / "real" / "a")
    (tmp_path / "real" / "a" / "round").symlink_to(tmp_path / "in")
    rows = [("0.jpg", "in a linked folder"), ("t.jpg", "in a linked archive")]
    rows += [("link/../1.jpg", "beside the folder that the link leads to")]
    assert csv(tmp_path, table(tmp_path / "t.tsv", rows), tmp_path / "in") == 0
    numbers = (0, 2, 3)
    expected = [(text, jpeg(n)) for (_, text), n in zip(rows, numbers, strict=True)]
    assert pairs_of(tmp_path / "out") == expected


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, capsys):
    source = write_files(tmp_path / "s", {"a/0.jpg": jpeg(0), "b/1.jpg": jpeg(1)})
    scan = os.scandir

    def denied(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert csv(tmp_path, table(tmp_path / "t.tsv", [("1.jpg", "1")]), source) == 2
    assert f"Permission denied: '{source}/a'" in capsys.readouterr().err


def test_names_with_wildcards_are_names_first(tmp_path):
    write_files(tmp_path, {"a1/0.jpg": jpeg(1), "a[1]/0.jpg": jpeg(0)})
    rows = table(tmp_path / "t.tsv", [("0.jpg", "it")])
    assert csv(tmp_path, rows, tmp_path / "a[1]") == 0
    assert pairs_of(tmp_path / "out") == [("it", jpeg(0))]


# archives -----------------------------------------------------------------------------------------


def test_links_in_a_tar_are_the_files_that_they_name(tmp_path):
    files = {"empty.tar": b"", "a/0.jpg": jpeg(0), "./1.jpg": jpeg(1)}
    source = write_tar(tmp_path / "s.tar", files)
    with tarfile.open(source, "a") as tar:
        for name, kind, target in (
            ("hard.jpg", tarfile.LNKTYPE, "a/0.jpg"),
            ("a/soft.jpg", tarfile.SYMTYPE, "../1.jpg"),
            ("out.jpg", tarfile.SYMTYPE, str(tmp_path / "0.jpg")),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    write_files(tmp_path, {"0.jpg": jpeg(3)})
    rows = [("hard.jpg", "hard"), ("a/soft.jpg", "soft"), ("out.jpg", "from elsewhere")]
    assert csv(tmp_path, table(tmp_path / "t.tsv", rows), source) == 0
    assert pairs_of(tmp_path / "out") == [("hard", jpeg(0)), ("soft", jpeg(1))]
    assert dropped(tmp_path / "out") == [("out.jpg", "missing")]


def sparse(folder):
    """A tar of a file with a hole, as ``tar -S`` writes it, and of another behind it."""
    member = tarfile.TarInfo("0.bmp")
    member.type, member.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)  # the only part with data
    header[483:495] = b"%011o\0" % 2048  # the size with the hole
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    whole = write_tar(folder / "s.tar", {"1.jpg": jpeg(1)}).read_bytes()
    (folder / "s.tar").write_bytes(bytes(header) + encoded(0, "BMP")[:512] + whole)


def behind_one_another(folder):
    one, two = (write_tar(folder / f"{n}.tar", {f"{n}.jpg": jpeg(n)}) for n in range(2))
    (folder / "s.tar").write_bytes(one.read_bytes() + two.read_bytes())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (sparse, "s.tar: 0.bmp is a sparse file; unpack it and give the folder"),
        (behind_one_another, "s.tar: damaged or cut short (behind its end more follows"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_tars_that_would_be_misread_are_errors(tmp_path, capsys, make, message, packed):
    make(tmp_path)
    if packed:
        (tmp_path / "s.tar").write_bytes(gzip.compress((tmp_path / "s.tar").read_bytes()))
    rows = table(tmp_path / "t.tsv", [("0.bmp", "0"), ("1.jpg", "1")])
    assert csv(tmp_path, rows, tmp_path / "s.tar") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["S.TAR", "S.Zip", "S.TAR.GZ"])
def test_the_case_of_an_archives_suffix_does_not_count(tmp_path, name):
    kind = name.lower().rpartition(".")[2]
    if kind == "zip":
        pack("zip", tmp_path, {"0.jpg": jpeg(0)}).rename(tmp_path / name)
    else:
        write_tar(tmp_path / name, {"0.jpg": jpeg(0)}, "w:gz" if kind == "gz" else "w")
    assert csv(tmp_path, table(tmp_path / "t.tsv", [("0.jpg", "0")]), tmp_path / name) == 0
    assert pairs_of(tmp_path / "out") == [("0", jpeg(0))]


def test_names_of_a_zip_that_does_not_say_they_are_utf8(tmp_path):
    source = pack("zip", tmp_path, {"XX.jpg": jpeg(0), "Y.jpg": jpeg(1), "d\\1.jpg": jpeg(2)})
    content = source.read_bytes().replace(b"XX", "é".encode()).replace(b"Y.j", b"\x82.j")
    source.write_bytes(content)
    rows = table(tmp_path / "t.tsv", [("é.jpg", "of macOS or DOS")])
    assert csv(tmp_path, rows, source) == 2  # both, so neither
    source.write_bytes(content.replace(b"\x82.j", b"\x81.j"))
    rows = [("é.jpg", "of macOS"), ("ü.jpg", "of DOS"), ("d/1.jpg", "with backslashes")]
    assert csv(tmp_path, table(tmp_path / "u.tsv", rows), source, out="out2") == 0
    assert pairs_of(tmp_path / "out2") == [(text, jpeg(n)) for n, (_, text) in enumerate(rows)]


def test_a_zip_written_to_a_pipe_is_checked_too(tmp_path):
    class Pipe(io.BytesIO):
        def seekable(self):
            return False

        def seek(self, *_):
            raise io.UnsupportedOperation

        tell = seek

    pipe, pictures = Pipe(), [encoded(n, "BMP") for n in range(2)]
    with zipfile.ZipFile(pipe, "w") as archive:
        for n, content in enumerate(pictures):
            archive.writestr(f"{n}.bmp", content)
    content = bytearray(pipe.getvalue())
    content[content.index(pictures[0]) + 300] ^= 1  # a pixel
    (tmp_path / "s.zip").write_bytes(content)
    rows = table(tmp_path / "t.tsv", [("0.bmp", "damaged"), ("1.bmp", "whole")])
    assert csv(tmp_path, rows, tmp_path / "s.zip") == 0
    assert [text for text, _ in pairs_of(tmp_path / "out")] == ["whole"]
    assert dropped(tmp_path / "out") == [("0.bmp", "undecodable")]


# tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
@pytest.mark.parametrize("form", ["plain", "quoted", "bom crlf", "gz"])
def test_separator_quotes_and_line_ends_are_found_out(tmp_path, capsys, separator, form):
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
    named = {"\t": "tabs", ",": "commas", ";": "semicolons"}[separator]
    assert f"fields separated by {named}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "t.tsv is empty"),
        (b"\n \n", "t.tsv is empty"),
        (b"a\tb\n", "t.tsv:1: has no column 'filepath' but 'a', 'b'"),
        (b"filepath\ttitle\ttitle\n", "t.tsv:1: has two 'title'"),
        (b"filepath\ttitle\n0.jpg\ta\n0.jpg\n", "t.tsv:3: 1 fields, the header has 2"),
        (b"filepath\ttitle\n0.jpg\ta\tb\n", "t.tsv:2: 3 fields"),
        (b'filepath\ttitle\n0.jpg\ta\n0.jpg\t"open\n0.jpg\tb\n', "t.tsv:3: unexpected end"),
        (b'filepath\ttitle\n0.jpg\t"a" b\n', "t.tsv:2: '\t' expected after"),
        (b"filepath\ttitle\n0.jpg\ta\n0.jpg\t\xe9\n", "t.tsv:3: not UTF-8 text (byte 7"),
        (b"filepath\ttitle\r0.jpg\ta\r", "t.tsv:1: a carriage return inside a line"),
        (b'filepath\ttitle\n0.jpg\t"a\n0.jpg\tb"\n', "t.tsv:2: a quoted field goes over rows"),
        (b'title\tfilepath\n"a\t0.jpg\nb"\t0.jpg\n', "t.tsv:2: a quoted field goes over rows"),
        (
            "filepath\ttitle\n".encode("utf-16"),
            "t.tsv:1: not UTF-8 text (byte 1 is 0xff); convert",
        ),
    ],
)
def test_a_table_that_is_none_is_an_error_with_its_line(tmp_path, capsys, text, message):
    (tmp_path / "t.tsv").write_bytes(text)
    write_files(tmp_path, {"0.jpg": jpeg(0)})
    assert csv(tmp_path, tmp_path / "t.tsv") == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.tar"))


def test_quotation_marks_may_be_only_that(tmp_path):
    write_files(tmp_path, {"0.jpg": jpeg(0)})
    path = table(tmp_path / "t.tsv", [("0.jpg", '"a" b')])
    words = ["csv", "--captions", path, "--output", tmp_path / "out", "--no-quotes"]
    assert run(*words) == 0 and pairs_of(tmp_path / "out") == [('"a" b', jpeg(0))]


# pixels -------------------------------------------------------------------------------------------


def deep(array, form, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


RAMP = np.arange(480).reshape(20, 24)


def white_is_zero(array, **options):
    """A TIFF whose tag says that 0 is white."""
    content = bytearray(deep(array, "TIFF", **options))
    at = content.index(b"\x06\x01\x03\0\x01\0\0\0")
    content[at + 8 : at + 10] = b"\0\0"
    return bytes(content)


def twelve_bits(array):
    """A TIFF of 12 bits a pixel, two of them in three bytes."""
    pairs = [(int(a), int(b)) for a, b in array.reshape(-1, 2)]
    content = b"".join((a << 12 | b).to_bytes(3, "big") for a, b in pairs)
    tags = {256: 24, 257: 20, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 20, 279: 720}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + content


def fits(array):
    """FITS has signed integers and an offset, which Pillow does not look at."""
    cards = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": 24, "NAXIS2": 20, "BZERO": 32768}
    head = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in cards.items()) + "END"
    return head.ljust(2880).encode() + array.astype(">i2").tobytes().ljust(2880, b"\0")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (deep((RAMP * 130).astype(np.uint16), "PNG"), RAMP * 130 / 257),
        (deep((RAMP * 130).astype(np.uint16), "TIFF"), RAMP * 130 / 257),
        (deep((RAMP * 8).astype(np.uint16), "TIFF", tiffinfo={281: 4095}), RAMP * 8 * 255 / 4095),
        (b"P5 24 20 999\n" + (RAMP * 2).astype(">u2").tobytes(), RAMP * 2 * 255 / 999),
        (deep((RAMP / 480).astype(np.float32), "TIFF", tiffinfo={341: 1.0}), RAMP * 255 / 480),
        (deep((RAMP / 480).astype(np.float32), "TIFF"), "F pixels of no stated range"),
        (deep(RAMP.astype(np.int32), "TIFF"), "I pixels of no stated range"),
        (deep(RAMP.astype(np.float32), "TIFF", tiffinfo={341: 1.0}), "F pixels outside"),
        (white_is_zero((RAMP * 130).astype(np.uint16)), 255 - RAMP * 130 / 257),
        (
            white_is_zero((RAMP * 8).astype(np.uint16), tiffinfo={281: 4095}),
            255 - RAMP * 8 * 255 / 4095,
        ),
        (twelve_bits(RAMP * 8), RAMP * 8 * 255 / 4095),
        (b"Pf 24 20 -1.0\n" + (RAMP / 480).astype("<f4").tobytes(), "F pixels of no|not an image"),
        (fits(RAMP), "I(;16)? pixels of no stated range"),
        (
            deep((RAMP * 8).astype(np.uint16), "TIFF", tiffinfo={281: 4095}).replace(
                b"\x19\x01\x03\0\x01\0\0\0", b"\x19\x01\x02\0\x01\0\0\0"
            ),
            "ufunc",  # a number that is a text
        ),
    ],
)
def test_deep_pixels_keep_their_meaning_or_go(tmp_path, capsys, content, expected):
    write_files(tmp_path, {"0.x": content, "1.jpg": jpeg(1)})
    path = table(tmp_path / "t.tsv", [("0.x", "deep"), ("1.jpg", "flat")])
    assert csv(tmp_path, path) == 0
    stored = samples(tmp_path / "out" / "00000.tar")
    if isinstance(expected, str):
        assert stored.keys() == {"000000001"}
        said = (tmp_path / "out" / "dropped.tsv").read_text()
        assert re.search(f"0.x\tundecodable\t({expected})", said)
        return
    image = np.asarray(Image.open(io.BytesIO(stored["000000000"]["png"])).convert("RGB"))
    assert np.abs(image - expected[..., None]).max() <= 0.51


def test_orientation_stays_what_open_clip_passes_over(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    content = encoded(3, "JPEG", exif=exif.tobytes())
    write_files(tmp_path, {"0.jpg": content})
    path = table(tmp_path / "t.tsv", [("0.jpg", "turned")])
    assert csv(tmp_path, path) == 0
    assert pairs_of(tmp_path / "out") == [("turned", content)]
    words = ["csv", "--captions", path, "--output", tmp_path / "small", "--resize", "10"]
    assert run(*words) == 0
    ((_, small),) = pairs_of(tmp_path / "small")
    assert Image.open(io.BytesIO(small)).size == (12, 10)  # 24 x 20, not turned


# number of shards ---------------------------------------------------------------------------------


def test_number_of_shards(tmp_path, capsys):
    write_files(tmp_path, {f"{n}.jpg": jpeg(n) for n in range(19)})
    path = table(tmp_path / "t.tsv", [(f"{n}.jpg", str(n)) for n in range(19)])
    assert csv(tmp_path, path, out="few") == 0
    assert "Shards: 1. open_clip needs one" in capsys.readouterr().out
    words = ["csv", "--captions", path, "--output", tmp_path / "out", "--shards"]
    assert run(*words, "8") == 0
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_text())
    assert len(sizes) == 8 and set(sizes.values()) == {2, 3} and sum(sizes.values()) == 19
    assert run(*words, "9") == 2
    assert "--shards was 8" in capsys.readouterr().err


# img2dataset's parquet, Hugging Face --------------------------------------------------------------


def parquet(path, columns):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_table(arrow.table(columns), path, row_group_size=2)
    return path


def test_img2dataset_parquet(tmp_path, capsys):
    urls = [f"http://x/{n}" for n in range(4)]
    images = [jpeg(n) if n != 2 else None for n in range(4)]
    status = ["success" if image else "failed" for image in images]
    columns = {"url": urls, "caption": ["theirs"] * 4, "status": status, "jpg": images}
    parquet(tmp_path / "images" / "00000.parquet", columns)
    (tmp_path / "cc.tsv").write_text("".join(f"caption {n}\t{url}\n" for n, url in enumerate(urls)))
    words = ["cc3m", "--captions", tmp_path / "cc.tsv", "--img2dataset", tmp_path / "images"]
    assert run(*words, "--output", tmp_path / "out") == 0
    assert pairs_of(tmp_path / "out") == [(f"caption {n}", jpeg(n)) for n in (0, 1, 3)]
    assert "1 not downloaded" in capsys.readouterr().out
    words[-1] = tmp_path / "images" / "00000.parquet"
    assert run(*words, "--output", tmp_path / "named") == 0
    assert pairs_of(tmp_path / "named") == pairs_of(tmp_path / "out")
    # Beside tars parquet files are statistics.
    img2dataset(tmp_path / "tars", [({"url": urls[0]}, jpeg(0))], "webdataset")
    words[-1] = tmp_path / "tars"
    assert run(*words, "--output", tmp_path / "out2") == 0
    assert pairs_of(tmp_path / "out2") == [("caption 0", jpeg(0))]
    (tmp_path / "images" / "00000.parquet").write_bytes(b"PAR1PAR1")
    words[-1] = tmp_path / "images"
    assert run(*words, "--output", tmp_path / "out3") == 2
    assert "00000.parquet: damaged or cut short" in capsys.readouterr().err


def test_img2dataset_in_several_runs_and_forms(tmp_path):
    urls = [f"http://x/{n}" for n in range(8)]
    rows = [({"url": url}, jpeg(n)) for n, url in enumerate(urls)]
    img2dataset(tmp_path / "tars", rows[:2], "webdataset")
    img2dataset(tmp_path / "files", rows[2:6], "files")
    parquet(tmp_path / "tables" / "00000.parquet", {"url": urls[6:7], "jpg": [jpeg(6)]})
    (tmp_path / "tables" / "_tmp").mkdir()  # left by a run that was stopped
    names = {
        f"{dots}0.{s}": c for dots in ("._", "") for s, c in (("jpg", jpeg(7)), ("json", b"{"))
    }
    names["0.json"] = json.dumps({"url": urls[7]}).encode()
    write_tar(tmp_path / "tars" / "of_a_mac.tar", names)
    (tmp_path / "files" / "00001").rename(tmp_path / "elsewhere")
    (tmp_path / "files" / "00001").symlink_to(tmp_path / "elsewhere")
    path = table(tmp_path / "t.tsv", [(url, str(n)) for n, url in enumerate(urls)])
    words = ["csv", "--captions", path, "--no-shuffle", "--img2dataset", tmp_path / "tars"]
    words += [tmp_path / "tables"]
    for name, given in (("whole", ["files"]), ("parts", ["files/00000", "files/00001"])):
        images = [tmp_path / each for each in given]
        assert run(*words, *images, "--output", tmp_path / name) == 0
        assert pairs_of(tmp_path / name) == [(str(n), jpeg(n)) for n in range(8)]


def test_tables_of_images_without_pyarrow(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run("hf", "--dataset", tmp_path / "a.parquet", "--output", tmp_path / "out") == 2
    assert "pip install 'otter-openclip[parquet]'" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["hub", "save_to_disk", "paths"])
def test_hugging_face(tmp_path, form):
    arrow = pytest.importorskip("pyarrow")
    images = [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(3)]
    if form == "paths":
        write_files(tmp_path / "set", {f"{n}.jpg": jpeg(n) for n in range(2)})
        kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
        images = arrow.array([{"bytes": None, "path": f"{n}.jpg"} for n in range(3)], kind)
    columns = {"image": images, "text": [["one", "un"], ["two"], ["three"]], "n": [1, 2, 3]}
    if form == "save_to_disk":
        path = tmp_path / "set" / "train" / "data-00000-of-00001.arrow"
        path.parent.mkdir(parents=True)
        columns = arrow.table(columns)
        with arrow.ipc.new_stream(path, columns.schema) as writer:
            writer.write_table(columns)
    else:
        parquet(tmp_path / "set" / "train-00000-of-00001.parquet", columns)
    words = ["hf", "--dataset", tmp_path / "set", "--output", tmp_path / "out", "--no-shuffle"]
    assert run(*words) == 0
    kept = [("one", jpeg(0)), ("un", jpeg(0)), ("two", jpeg(1)), ("three", jpeg(2))]
    assert pairs_of(tmp_path / "out") == (kept[:3] if form == "paths" else kept)
    assert len(dropped(tmp_path / "out")) == (form == "paths")


def test_hugging_face_columns(tmp_path, capsys):
    image = [{"bytes": jpeg(0), "path": None}]
    parquet(tmp_path / "a.parquet", {"image": image, "en": ["dog"], "de": ["Hund"]})
    words = ["hf", "--dataset", tmp_path / "a.parquet", "--output", tmp_path / "out"]
    assert run(*words) == 2
    assert "2 columns of text among en, de, image_path" in capsys.readouterr().err
    assert run(*words, "--text-key", "fr") == 2
    assert "no column 'fr' but en, de" in capsys.readouterr().err
    assert run(*words, "--text-key", "de") == 0
    assert pairs_of(tmp_path / "out") == [("Hund", jpeg(0))]
    parquet(tmp_path / "b.parquet", {"en": ["dog"]})
    assert run("hf", "--dataset", tmp_path / "b.parquet", "--output", tmp_path / "out2") == 2
    assert "0 columns of images among en" in capsys.readouterr().err


PICTURES = [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(3)]


@pytest.mark.parametrize(
    ("columns", "words", "message"),
    [
        # Which column is text must not hang on the first row.
        ({"caption": [None, "a"], "file": ["x", "y"]}, (), "2 columns of text among caption, file"),
        ({"caption": [[], ["a"]], "file": ["x", "y"]}, (), "2 columns of text among caption, file"),
        ({"label": [0, 1]}, ("--text-key", "label"), "row 0: no text in 'label', but 0"),
        ({"said": [[{"raw": "a"}]] * 2}, ("--text-key", "said"), "row 0: no text in 'said', but {"),
        ([["a", "b"], ["c", "d"]], (), "two columns of one name among image, text, text"),
    ],
)
def test_hugging_face_captions_that_are_none(tmp_path, capsys, columns, words, message):
    arrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    if isinstance(columns, list):
        names, arrays = ["text"] * len(columns), columns
    else:
        names, arrays = list(columns), list(columns.values())
    whole = arrow.Table.from_arrays(
        list(map(arrow.array, [PICTURES[:2], *arrays])), ["image", *names]
    )
    writer.write_table(whole, tmp_path / "a.parquet")
    out = ["--output", tmp_path / "out"]
    assert run("hf", "--dataset", tmp_path / "a.parquet", *out, *words) == 2
    assert message in capsys.readouterr().err


def test_hugging_face_rows_of_a_list_are_all_accounted_for(tmp_path):
    captions = [["one", None], [], ["three"]]
    parquet(tmp_path / "A.PARQUET", {"image": PICTURES, "text": captions})
    words = ["hf", "--dataset", tmp_path, "--output", tmp_path / "out", "--no-shuffle"]
    assert run(*words) == 0
    assert pairs_of(tmp_path / "out") == [("one", jpeg(0)), ("three", jpeg(2))]
    assert [name[-5:] for name, _ in dropped(tmp_path / "out")] == ["row 0", "row 1"]


def test_hugging_face_files_that_are_no_further_data(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    rows = arrow.table({"image": PICTURES, "text": ["a", "b", "c"]})
    source = tmp_path / "set"
    source.mkdir()
    with arrow.ipc.new_file(source / "data.arrow", rows.schema) as writer:  # not a stream
        writer.write_table(rows)
    with arrow.ipc.new_stream(source / "cache-0a1b.arrow", rows.schema) as writer:
        writer.write_table(rows.slice(1))  # of Dataset.filter
    parquet(tmp_path / "blob", {"image": [{"bytes": jpeg(3), "path": "3"}], "text": ["d"]})
    for revision in ("one", "two"):  # of the hub's cache
        (source / revision).mkdir()
        (source / revision / "train.parquet").symlink_to(tmp_path / "blob")
    words = ["hf", "--dataset", source, "--output", tmp_path / "out", "--no-shuffle"]
    assert run(*words) == 0
    assert sorted(pairs_of(tmp_path / "out")) == [(c, jpeg(n)) for n, c in enumerate("abcd")]
    words[2] = source / "cache-0a1b.arrow"
    words[4] = tmp_path / "out2"
    assert run(*words) == 0 and pairs_of(tmp_path / "out2") == [("b", jpeg(1)), ("c", jpeg(2))]


@pytest.mark.parametrize("inside", [False, True])
def test_an_arrow_stream_that_stops(tmp_path, capsys, inside):
    arrow = pytest.importorskip("pyarrow")
    rows, path = arrow.table({"image": PICTURES, "text": ["a", "b", "c"]}), tmp_path / "a.arrow"
    with arrow.ipc.new_stream(path, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=1)
    whole = path.read_bytes()
    file = arrow.BufferReader(whole)
    messages = arrow.ipc.MessageReader.open_stream(file)
    for _ in range(3):  # the schema and two rows
        messages.read_next_message()
    path.write_bytes(whole[: file.tell() - 99 * inside])
    assert run("hf", "--dataset", path, "--output", tmp_path / "out") == 2
    assert "a.arrow: damaged or cut short" in capsys.readouterr().err


# addresses ----------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder):
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("kind", ["folder", "tar", "zip", "tar.gz"])
def test_the_same_from_http_as_from_disk(tmp_path, kind):
    pytest.importorskip("aiohttp")
    files = {f"{n % 2}/{n}.jpg": jpeg(n) for n in range(3)}
    files |= {"a b.jpg": jpeg(3), "é/1.jpg": jpeg(4), "c%20d.jpg": jpeg(5)}
    if kind == "tar.gz":
        source = write_tar(tmp_path / "source.tar.gz", files, "w:gz")
    else:
        source = pack(kind, tmp_path, files)
    path = table(tmp_path / "t.tsv", [(name, name) for name in [*files, "0/9.jpg"]])
    assert csv(tmp_path, path, source, out="disk") == 0
    with served(tmp_path) as address:
        words = ["csv", "--captions", f"{address}/t.tsv", "--images", f"{address}/{source.name}"]
        assert run(*words, "--output", tmp_path / "out", "--no-shuffle") == 0
    shards = [
        {n: h for n, h in tree(tmp_path / out).items() if n.endswith("r")}
        for out in ("out", "disk")
    ]
    assert shards[0] == shards[1] and len(shards[0]) == 1
    assert dropped(tmp_path / "out") == [("0/9.jpg", "missing")]


def test_img2dataset_files_at_an_address(tmp_path):
    memory = fsspec.filesystem("memory")
    rows = [({"url": f"http://x/{n}"}, jpeg(n)) for n in range(4)]
    memory.put(str(img2dataset(tmp_path / "images", rows, "files")), "/i2d", recursive=True)
    path = table(tmp_path / "t.tsv", [(f"http://x/{n}", str(n)) for n in range(4)])
    words = ["csv", "--captions", path, "--img2dataset", "memory://i2d", "--no-shuffle"]
    try:
        assert run(*words, "--output", tmp_path / "out") == 0
        assert pairs_of(tmp_path / "out") == [(str(n), jpeg(n)) for n in range(4)]
    finally:
        memory.rm("/i2d", recursive=True)


def test_without_images_nothing_is_searched(tmp_path, monkeypatch):
    """What else lies in the current folder or beside the table is none of the build's business."""
    write_files(tmp_path / "here", {"deep/1.jpg": jpeg(1), "broken.tar": b"no tar"})
    write_files(tmp_path / "here", {"3.jpg": jpeg(3)})
    write_tar(tmp_path / "here" / "other.tar", {"0.jpg": jpeg(2), "2.jpg": jpeg(3)})
    write_files(tmp_path / "there", {"0.jpg": jpeg(0), "3.jpg": jpeg(0), "broken.zip": b"no zip"})
    rows = [("0.jpg", "beside"), ("1.jpg", "deeper"), ("2.jpg", "in an archive")]
    rows += [("3.jpg", "as open_clip has it")]
    path = table(tmp_path / "there" / "t.tsv", rows)
    monkeypatch.chdir(tmp_path / "here")
    assert csv(tmp_path, path) == 0
    assert pairs_of(tmp_path / "out") == [("beside", jpeg(0)), ("as open_clip has it", jpeg(3))]
    assert dropped(tmp_path / "out") == [("1.jpg", "missing"), ("2.jpg", "missing")]
    write_tar(tmp_path / "here" / "further.tar", {})  # a complete build stays what it is
    assert csv(tmp_path, path) == 0
