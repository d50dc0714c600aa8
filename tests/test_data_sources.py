"""Where builders find pictures and captions: exact look-ups, strict tables, addresses, columns."""

import contextlib
import functools
import http.server
import io
import json
import shutil
import sys
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
    "a/7.jpg": 4,  # the end of one path
    "/home/me/b/7.jpg": 5,
}


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_a_path_means_that_file_in_folders_tars_and_zips_alike(tmp_path, kind):
    source = pack(kind, tmp_path, {name: jpeg(n) for name, n in FILES.items()})
    rows = [(path, f"picture {n}") for path, n in FOUND.items()]
    rows += [("0.png", "any"), ("c/0.png", "any"), ("only.jpg", "case"), ("only", "no suffix")]
    assert csv(tmp_path, table(tmp_path / "t.tsv", rows), source) == 0
    assert pairs_of(tmp_path / "out") == [(f"picture {n}", jpeg(n)) for n in FOUND.values()]
    lost = {("0.png", "ambiguous"), ("c/0.png", "ambiguous")}
    assert set(dropped(tmp_path / "out")) == lost | {("only.jpg", "missing"), ("only", "missing")}
    report = (tmp_path / "out" / "dropped.tsv").read_text()
    assert "a/0.png" in report and "b/0.png" in report  # the candidates


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_a_stem_is_the_whole_name_but_its_suffix(tmp_path, kind):
    files = {"x/b.PNG": jpeg(0), "a.small.jpg": jpeg(1), "a.txt": b"", "x/a.small.jpg": jpeg(2)}
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
    rows += [("x/2.jpg", "one"), ("y/2.jpg", "other"), ("z/2.jpg", "third")]
    assert csv(tmp_path, table(tmp_path / "t.tsv", rows), source) == 0
    assert pairs_of(tmp_path / "out") == [("its path", jpeg(1))]
    other = ("b/1.jpg", "file name of another row")
    assert dropped(tmp_path / "out") == [
        other,
        *((f"{d}/2.jpg", "ambiguous") for d in "xyz"),
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


# tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
@pytest.mark.parametrize("form", ["plain", "quoted", "bom crlf", "gz"])
def test_separator_quotes_and_line_ends_are_found_out(tmp_path, capsys, separator, form):
    import gzip

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
    ],
)
def test_deep_pixels_keep_their_meaning_or_go(tmp_path, capsys, content, expected):
    write_files(tmp_path, {"0.x": content, "1.jpg": jpeg(1)})
    path = table(tmp_path / "t.tsv", [("0.x", "deep"), ("1.jpg", "flat")])
    assert csv(tmp_path, path) == 0
    stored = samples(tmp_path / "out" / "00000.tar")
    if isinstance(expected, str):
        assert stored.keys() == {"000000001"}
        assert f"0.x\tundecodable\t{expected}" in (tmp_path / "out" / "dropped.tsv").read_text()
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
    assert "Shards: 1, for 19 samples" in (out := capsys.readouterr().out) and "--shards 8" in out
    words = ["csv", "--captions", path, "--output", tmp_path / "out", "--shards"]
    assert run(*words, "8") == 0
    assert "--shards 8 makes" not in capsys.readouterr().out
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_text())
    assert len(sizes) == 8 and set(sizes.values()) == {2, 3} and sum(sizes.values()) == 19
    assert run(*words, "9") == 2
    assert "--shards was 8 and is now 9" in capsys.readouterr().err


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


def test_tables_of_images_without_pyarrow(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run("hf", "--dataset", tmp_path / "a.parquet", "--output", tmp_path / "out") == 2
    assert "pip install 'otter-openclip[parquet]'" in capsys.readouterr().err


def test_a_zip_with_backslashes(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for n in range(2):
            archive.writestr(f"{n}\\0.jpg", jpeg(n))
    path = table(tmp_path / "t.tsv", [("1/0.jpg", "one"), ("0/0.jpg", "zero")])
    assert csv(tmp_path, path, tmp_path / "s.zip") == 0
    assert pairs_of(tmp_path / "out") == [("one", jpeg(1)), ("zero", jpeg(0))]


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
    files = {f"{n % 2}/{n}.jpg": jpeg(n) for n in range(5)}
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


def test_an_upload_that_failed_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_files(tmp_path, {"0.jpg": jpeg(0)})
    path = table(tmp_path / "t.tsv", [("0.jpg", "one")])
    words = ["csv", "--captions", path, "--output", f"file://{tmp_path}/remote/out"]
    (tmp_path / "remote").write_text("in the way")
    assert run(*words) == 2
    (tmp_path / "remote").unlink()
    assert run(*words) == 0 and pairs_of(tmp_path / "remote" / "out") == [("one", jpeg(0))]
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_output_and_input_at_an_address(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    write_files(tmp_path, {f"{n}.jpg": jpeg(n) for n in range(5)})
    path = table(tmp_path / "t.tsv", [(f"{n}.jpg", str(n)) for n in range(5)])
    memory.put(str(tmp_path), "/in", recursive=True)
    words = ["csv", "--captions", "memory://in/t.tsv", "--images", "memory://in", "--shards", "2"]
    words += ["--output", "memory://out/pairs"]
    try:
        assert run(*words) == 0
        assert "--train-data 'memory://out/pairs/{00000..00001}.tar'" in capsys.readouterr().out
        assert not list((tmp_path / "cache").rglob("*.tar"))
        memory.get("/out/pairs", str(tmp_path / "got"), recursive=True)
        assert (
            run(
                "csv",
                "--captions",
                path,
                "--images",
                tmp_path,
                "--shards",
                "2",
                "--output",
                tmp_path / "disk",
            )
            == 0
        )
        stored = [tree(tmp_path / name) for name in ("got", "disk")]
        assert stored[0].keys() == stored[1].keys()
        for name in ("00000.tar", "00001.tar", "sizes.json"):
            assert stored[0][name] == stored[1][name]
        assert run(*words) == 0 and "5 samples in 2 shards" in capsys.readouterr().out
        assert run(*words, "--seed", "1") == 2
        assert "--seed was 0 and is now 1" in capsys.readouterr().err
    finally:
        memory.rm("/in", recursive=True)
        memory.rm("/out", recursive=True)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)


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


def test_without_images_the_current_folder_comes_first(tmp_path, monkeypatch):
    write_files(tmp_path / "here", {"0.jpg": jpeg(0)})
    write_files(tmp_path / "there", {"0.jpg": jpeg(1), "1.jpg": jpeg(2)})
    path = table(
        tmp_path / "there" / "t.tsv", [("0.jpg", "as open_clip has it"), ("1.jpg", "else")]
    )
    monkeypatch.chdir(tmp_path / "here")
    assert csv(tmp_path, path) == 0
    assert pairs_of(tmp_path / "out") == [("as open_clip has it", jpeg(0)), ("else", jpeg(2))]
