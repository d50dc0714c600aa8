"""Builders of the training sets, on small files in the official formats."""

import bz2
import csv
import gzip
import hashlib
import json

import pandas
import pytest
from data_helpers import dropped, jpeg, refused, run, samples, skipped, tree, write_files, write_tar
from open_clip_train.data import get_dataset_size

from otter_openclip.data import cc3m


def pairs_of(output):
    """caption -> image of everything in ``output``, checked against sizes.json and stock's reader."""
    sizes = json.loads((output / "sizes.json").read_text(encoding="utf-8"))
    shards = sorted(output.glob("*.tar"))
    assert list(sizes) == [shard.name for shard in shards]
    assert shards[0].name == "00000.tar" and len(shards) == int(shards[-1].stem) + 1
    for shard in shards:
        assert sizes[shard.name] == len(samples(shard))
    pattern = str(output / f"{{00000..{len(shards) - 1:05d}}}.tar")
    assert get_dataset_size(pattern) == (sum(sizes.values()), len(shards))
    stored = samples(*shards)
    return [(files["txt"].decode(), files.get("jpg")) for _, files in sorted(stored.items())]


def img2dataset(folder, rows, kind):
    """What img2dataset writes for ``rows`` of (metadata, image): three images a shard."""
    for n, (metadata, image) in enumerate(rows):
        place = 0 if kind == "webdataset, one key" else n % 3
        shard, key = f"{n // 3:05d}", f"{n // 3:05d}{place:04d}"
        metadata = {"caption": "theirs", "key": key, "status": "success", **metadata, "sha256": "0"}
        text = json.dumps(metadata, indent=4).encode()
        files = {f"{key}.jpg": image, f"{key}.json": text, f"{key}.txt": b"theirs"}
        if kind == "files":
            write_files(folder / shard, files)
        else:
            write_tar(folder / f"{shard}.tar", files, "a")
        (folder / f"{shard}_stats.json").write_text('{"count": 3}', encoding="utf-8")
        (folder / f"{shard}.parquet").write_bytes(b"PAR1")
    return folder


URLS = [f"http://example.com/{name}" for name in ("a.jpg", "b?x=1,2", "ç.jpg", "d", "e", "f", "g")]
CAPTIONS = ["a very typical bus station", 'sierra looked stunning in this " top "']
CAPTIONS += ["young café , owner", "not downloaded", "a web page", " ", "cut short"]


@pytest.fixture
def conceptual(tmp_path):
    """The reference's layout: cc/Train_GCC-training.tsv, the report and cc/training/."""
    rows = [*zip(CAPTIONS, URLS, strict=True), (CAPTIONS[0], URLS[0]), ("other words", URLS[0])]
    contents = [jpeg(0), jpeg(1), jpeg(2), b"", b"<html></html>", jpeg(5), jpeg(6)[:-150], jpeg(0)]
    files, report = {}, ""
    for n, (content, (_, url)) in enumerate(zip(contents, rows, strict=False)):
        name = f"training/{n}_{n * 7919}" if content else ""
        report += f"{name}\ttraining\timage/jpeg\t812.0\t{200 if content else 404}\t{url}\n"
        files |= {name: content} if content else {}
    captions = "".join(f"{caption}\t{url}\n" for caption, url in rows)
    tables = {"Train_GCC-training.tsv": captions, "downloaded_training_report.tsv": report}
    return write_files(tmp_path / "cc", files | {n: text.encode() for n, text in tables.items()})


def build_cc(root, *extra, source=None):
    line = ["cc3m", "--captions", root / "Train_GCC-training.tsv", "--output", root.parent / "out"]
    if source is None:
        source = ["--report", root / "downloaded_training_report.tsv", "--images", root]
    return run(*line, *source, *extra)


KEPT = [*zip(CAPTIONS[:3], [0, 1, 2], strict=True), ("other words", 0)]


def test_cc3m_from_the_references_layout(conceptual):
    # Of two URLs with one file, the first has it.
    with open(conceptual / "Train_GCC-training.tsv", "a", encoding="utf-8") as captions:
        captions.write("of another URL\thttp://x\n")
    with open(conceptual / "downloaded_training_report.tsv", "a", encoding="utf-8") as report:
        report.write("training/0_0\ttraining\timage/jpeg\t812.0\t200\thttp://x\n")
    assert build_cc(conceptual, "--shard-size", "2") == 0
    out = conceptual.parent / "out"
    assert pairs_of(out) == [(caption, jpeg(n)) for caption, n in KEPT]
    reasons = {0: "duplicate", 4: "undecodable", 5: "empty caption", 6: "undecodable"}
    lost = [(URLS[n], reason) for n, reason in reasons.items()]
    assert dropped(out) == [*lost, ("http://x", "file name of another URL")]
    assert skipped(out) == {"not downloaded": 1}


def test_processed_labels_are_the_references(conceptual):
    assert build_cc(conceptual) == 0
    path = conceptual.parent / "out" / "processed_labels.csv"
    # The reference's steps (data/cc_preprocess.py), without the pairs that we drop as repeated or empty.
    table, names = conceptual / "Train_GCC-training.tsv", ["caption", "url"]
    captions = pandas.read_csv(table, sep="\t", names=names)
    names = ["filename", "split", "type", "size", "status", "url"]
    report = pandas.read_csv(conceptual / "downloaded_training_report.tsv", sep="\t", names=names)
    # With "inner", as there, the order is that of the captions from pandas 2.2 on only.
    merged = captions.merge(report[["filename", "url"]], on="url", how="left")
    merged = merged[["filename", "caption"]].dropna().drop_duplicates("caption")
    merged = merged[~merged.filename.str.match("training/[456]_")].reset_index(drop=True)
    merged["filename"] = [str(conceptual / name) for name in merged["filename"]]
    assert path.read_text(encoding="utf-8") == merged.to_csv() and len(merged) == 4


@pytest.mark.parametrize("kind", ["webdataset, one key", "files"])
def test_cc3m_from_img2dataset(conceptual, kind):
    rows = [({"url": url}, jpeg(n)) for n, url in enumerate(URLS) if n not in (3, 4)]
    rows = rows[::-1]  # it writes them as they arrive
    rows[0] = (rows[0][0], jpeg(6)[:-150])
    folder = img2dataset(conceptual / "images", rows, kind)
    assert build_cc(conceptual, source=["--img2dataset", folder]) == 0
    out = conceptual.parent / "out"
    assert pairs_of(out) == [(caption, jpeg(n)) for caption, n in KEPT]
    assert (out / "processed_labels.csv").exists() == (kind == "files")
    assert skipped(out) == {"not downloaded": 2}
    assert dropped(out)[-1] == (URLS[6], "undecodable")


@pytest.mark.parametrize(
    ("cut", "files", "message"),
    [
        (3000, None, "00001.tar: damaged or cut short"),
        (0, {"0.jpg": jpeg(0)}, "00001.tar: no url in 0.json; is this the output of img2dataset"),
        (0, {"0.jpg": jpeg(0), "0.json": b"{"}, "00001.tar: no url in 0.json"),
    ],
)
def test_an_interrupted_img2dataset_is_an_error(conceptual, capsys, cut, files, message):
    rows = [({"url": url}, jpeg(n)) for n, url in enumerate(URLS)]
    folder = img2dataset(conceptual / "images", rows, "webdataset")
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[:cut])
    if files:
        write_tar(folder / "00001.tar", files)
    refused(capsys, build_cc(conceptual, source=["--img2dataset", folder]), message)


def test_header_quotes_and_compression_of_cc3m(tmp_path):
    path = tmp_path / "cc.tsv.gz"
    text = 'caption\turl\n"say ""cheese"""\thttp://a\na "b"\thttp://b\n"x" and "y"\thttp://c'
    path.write_bytes(gzip.compress(text.encode()))
    read = [('say "cheese"', "http://a"), ('a "b"', "http://b"), ('"x" and "y"', "http://c")]
    assert list(cc3m.read_captions(path)) == read


def test_the_seed_decides_the_order_and_nothing_else_does(tmp_path):
    rows = ["filepath\ttitle", *(f"{n}.jpg\tpicture {n}" for n in range(60))]
    files = {f"{n}.jpg": jpeg(n) if n % 7 else b"broken" for n in range(60)}
    write_files(tmp_path, files | {"table.tsv": "\n".join(rows).encode()})
    ways = {"again": "--workers 3", "zero": "", "one": "--seed 1", "plain": "--no-shuffle"}
    orders = {}
    for name, words in ways.items():
        line = ["csv", "--captions", tmp_path / "table.tsv", "--output", tmp_path / name]
        assert run(*line, "--shard-size", "8", *words.split()) == 0
        stored = samples(*sorted((tmp_path / name).glob("*.tar")))
        orders[name] = [files["txt"] for files in stored.values()]
        expected = [(f"picture {n}", jpeg(n)) for n in range(60) if n % 7]
        assert pairs_of(tmp_path / name) == expected
    assert tree(tmp_path / "zero") == tree(tmp_path / "again")
    assert len(set(map(tuple, orders.values()))) == 3
    assert orders["plain"] == [caption.encode() for caption, _ in expected]


PHOTOS = {
    2950110417: ("Canal+%26+boats", "A+%3Ca+href%3D%22x%22%3Ecanal%3C%2Fa%3E+in+Delft"),
    6185218911: ("IMG_0520", ""),
    7777: ("%C3%A9t%C3%A9", "Two%0Alines %2B 5 %3C 6 and 7 > %26amp%3B %3Ca%0Ab%3E"),
    8888: ("", "%3Cb%3E"),
    9999: ("video", "moving"),
}
CLEAN = {  # as data/yfcc.py of the reference has it: unquote, then + to blank, then tags
    2950110417: "Canal & boats. A canal in Delft",
    6185218911: "IMG_0520. ",
    7777: "été. Two\nlines   5  &amp; <a\nb>",
}


def photo_hash(photo):
    return hashlib.md5(str(photo).encode()).hexdigest()[: 32 - photo % 2]


def metadata_row(photo, columns):
    title, description = PHOTOS.get(photo, ("other", "photo"))
    url, marker = f"http://farm4.staticflickr.com/1/{photo}_secret.jpg", str(int(photo == 9999))
    row = [str(photo), *"undUc", title, description, *"tmlyap", url, *"lisfsoe", marker]
    return "\t".join(row if columns == 23 else ["17", row[0], photo_hash(photo), *row[1:]]) + "\n"


@pytest.fixture
def flickr(tmp_path):
    """The subset, and metadata in both forms that the release had: others too, one photo twice."""
    photos = enumerate([*PHOTOS, 424242])
    subset = "".join(f"{n}\t{photo}\t{photo_hash(photo)}\n" for n, photo in photos)
    photos = enumerate([1, *PHOTOS, 3, 7777])
    rows = "".join(metadata_row(photo, 25 if n % 2 else 23) for n, photo in photos)
    files = {"subset.tsv": subset.encode(), "metadata.bz2": bz2.compress(rows.encode())}
    return write_files(tmp_path, files)


def nested(photo):
    code = photo_hash(photo)
    return f"data/images/{code[:3]}/{code[3:6]}/{code}.jpg"


@pytest.mark.parametrize("kind", ["nested", "by id", "by url", "img2dataset"])
def test_yfcc15m(flickr, kind):
    source = flickr / "images"
    photos = [photo for photo in PHOTOS if photo != 9999]
    if kind == "img2dataset":
        url = "http://farm4.staticflickr.com/1/{}_secret.jpg"
        rows = [({"url": url.format(photo)}, jpeg(photo)) for photo in photos]
        img2dataset(source, rows, "webdataset")
    else:
        name = {"nested": nested, "by id": "{}.jpg".format, "by url": "{}_secret.jpg".format}[kind]
        write_files(source, {name(photo): jpeg(photo) for photo in photos})
    out, flag = flickr / "out", "--img2dataset" if kind == "img2dataset" else "--images"
    line = ["yfcc15m", "--subset", flickr / "subset.tsv", "--metadata", flickr / "metadata.bz2"]
    assert run(*line, "--output", out, flag, source) == 0
    stored = samples(*out.glob("*.tar"))
    assert {int(key): files["txt"].decode() for key, files in stored.items()} == CLEAN
    assert all(files["jpg"] == jpeg(int(key)) for key, files in stored.items())
    assert dropped(out) == [("7777", "duplicate"), ("8888", "empty caption")]
    assert skipped(out) == {"video": 1, "without metadata": 1}


COLUMNS = (
    "language page_url image_url page_title section_title hierarchical_section_title "
    "caption_reference_description caption_attribution_description caption_alt_text_description "
    "attribution_passes_lang_id context_page_description context_section_description"
).split()
COMMONS = "https://upload.wikimedia.org/wikipedia/commons/"


def wiki(language, image, reference="", alt="", attribution="", passes="true", title="Title"):
    row = dict.fromkeys(COLUMNS, "")
    row |= {"language": language, "image_url": image, "page_title": title}
    row |= {"caption_reference_description": reference, "caption_alt_text_description": alt}
    row |= {"caption_attribution_description": attribution, "attribution_passes_lang_id": passes}
    return list(row.values())


IMAGES = [COMMONS + name for name in ("a/a0/One.jpg", "b/b0/Zwei%2C_x.jpg", "c/c0/Three.jpg")]
ROWS = [
    wiki("en", IMAGES[0], reference="The first, here"),
    wiki("de", IMAGES[0], reference="Das erste"),
    wiki("en", IMAGES[0], reference="The first, here", title="Another page"),
    wiki("en", IMAGES[1], alt='Second "quoted"\nin two lines', attribution="English: second"),
    wiki("en", IMAGES[2], attribution="Tercero", passes="false"),
    wiki("en", IMAGES[2], attribution="English: third"),
    wiki("en", COMMONS + "d/d0/Gone.jpg", reference="gone"),
    wiki("en", COMMONS.replace("commons", "en") + "a/a1/One.jpg", reference="another One"),
]
WIT_PAIRS = [("The first, here", 0), ('Second "quoted"\nin two lines', 1), ("English: third", 2)]


@pytest.fixture
def wikipedia(tmp_path):
    for n, rows in enumerate((ROWS[:3], ROWS[3:])):
        path = tmp_path / f"wit_v1.train.all-0000{n}-of-00002.tsv.gz"
        with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerows([COLUMNS, *rows])
    return tmp_path


def build_wit(folder, *extra, out="out"):
    tables = sorted(folder.glob("*.tsv.gz"))
    return run("wit", "--tables", *tables, "--output", folder / out, *extra)


@pytest.mark.parametrize("kind", ["wget", "decoded", "wget -x", "img2dataset"])
def test_wit(wikipedia, kind):
    name = {
        "wget": lambda url: url.rpartition("/")[2],
        "decoded": lambda url: url.rpartition("/")[2].replace("%2C", ","),
        "wget -x": lambda url: url.removeprefix("https://"),
    }
    if kind == "img2dataset":
        rows = [({"url": url}, jpeg(n)) for n, url in enumerate(IMAGES)]
        source = ["--img2dataset", img2dataset(wikipedia / "images", rows, "webdataset")]
    else:
        files = {name[kind](url): jpeg(n) for n, url in enumerate(IMAGES)}
        source = ["--images", write_files(wikipedia / "images", files)]
    assert build_wit(wikipedia, *source) == 0
    out = wikipedia / "out"
    assert pairs_of(out) == [(caption, jpeg(n)) for caption, n in WIT_PAIRS]
    assert skipped(out)["in another language"] == 1 and skipped(out)["without a caption"] == 1
    assert (IMAGES[0], "duplicate") in dropped(out)
    other = "https://upload.wikimedia.org/wikipedia/en/a/a1/One.jpg"
    if kind != "img2dataset":  # wget -x tells that its own file is not there
        reason = "missing" if kind == "wget -x" else "file name of another URL"
        assert (other, reason) in dropped(out)


def test_wit_languages_and_caption_fields(wikipedia):
    files = {url.rpartition("/")[2]: jpeg(n) for n, url in enumerate(IMAGES)}
    images = write_files(wikipedia / "images", files)
    assert build_wit(wikipedia, "--images", images, "--languages", "all") == 0
    assert ("Das erste", jpeg(0)) in pairs_of(wikipedia / "out")
    line = ["--images", images, "--languages", "de", "--caption-fields", "title", "reference"]
    assert build_wit(wikipedia, *line, out="german") == 0
    assert pairs_of(wikipedia / "german") == [("Title", jpeg(0))]


CC = "cc3m --captions cc.tsv --report report.tsv"
YFCC = "yfcc15m --subset subset.tsv --metadata metadata.bz2"
NO_PHOTO = "subset.tsv:{}: expected line number, photo id and hash"


@pytest.mark.parametrize(
    ("command", "file", "text", "message"),
    [
        (CC, "cc.tsv", "only one column\n", "cc.tsv:1: 1 columns, expected caption, URL"),
        (CC, "cc.tsv", "a\rb\thttp://x\n", "cc.tsv:1: a carriage return inside"),
        ("cc3m --captions cc.tsv", "cc.tsv", "a\thttp://x\n", "--report and --images go together"),
        (YFCC, "subset.tsv", "1\t2\t3\nx\ty\tz\n", NO_PHOTO.format(2)),
        (YFCC, "subset.tsv", f"0\t{9**21}\tx\n1\t{9**21}\tx\n", NO_PHOTO.format(1)),
        (YFCC, "metadata.bz2", "1\t2\t3\n", "bz2:1: 3 columns; YFCC100M's metadata have 23 or 25"),
        (YFCC, "metadata.bz2", "9" * 20 + "\t" * 22, f"bz2:1: '{'9' * 20}' is no photo id"),
        ("wit --tables w.tsv", "w.tsv", "language\turl\n", "w.tsv:1: has no column 'image_url'"),
    ],
)
def test_errors_name_file_and_line(flickr, monkeypatch, capsys, command, file, text, message):
    content = bz2.compress(text.encode()) if file.endswith("bz2") else text.encode()
    write_files(flickr, {"cc.tsv": b"", "report.tsv": b"", file: content})
    monkeypatch.chdir(flickr)
    refused(capsys, run(*command.split(), "--images", ".", "--output", "out"), message)
