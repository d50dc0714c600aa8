"""Builders on spoiled tables, label files and archives: right, or an error that names the file.

Every caption begins with its row's number, and so does its picture's content: whatever happens to the
files, no caption may come out beside another row's picture.
"""

import bz2
import contextlib
import csv
import io
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import jpeg, pack, run, samples, write_files
from fuzz import MEMORY, examples
from hypothesis import given
from hypothesis import strategies as st

ROWS = 5
PICTURES = [jpeg(n) for n in range(ROWS)]
TAG = re.compile(r"<(\d)>")
# What files of text are spoiled with: never a digit, which would make another row of one.
STRUCTURE = b"""\t|,|;|"|""|\n|\r|\r\n|\0| |\xff|\xe2\x80|'|\\|<br>|%|+|{|]""".split(b"|")
STRUCTURE += ["\ufeff".encode(), "\u2028".encode()]
WORDS = st.text("aé漢😀\u2028\u00a0\"',;{}\\%+| ", max_size=12)
SPOILS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(STRUCTURE) | st.just(None)), max_size=3
)


def spoiled(content, spoils):
    """``content`` with bytes put in at places, or cut off there."""
    for place, extra in spoils:
        at = int(place * len(content))
        content = content[:at] if extra is None else content[:at] + extra + content[at:]
    return content


def build(folder, *words):
    """The command's status and what it said; no traceback can leave it."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        status = run(*words, "--output", folder / "out")
    assert status in (0, 2), said.getvalue()
    return status, said.getvalue()


def check_pairs(folder, status, said, inputs):
    """Captions lie beside their pictures, or an input is named."""
    out = folder / "out"
    found = samples(*sorted(out.glob("*.tar"))) if status == 0 else {}
    for files in found.values():
        tags = TAG.findall(files["txt"].decode())
        assert not tags or files["jpg"] == PICTURES[int(tags[0])], files["txt"]
    if status:
        assert any(str(path) in said for path in (*inputs, out)), said
    else:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        assert report["samples"] == len(found) > 0
    return found


@contextlib.contextmanager
def folder_of(files):
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield write_files(Path(name), files)


def table(rows, separator, quoting=csv.QUOTE_MINIMAL):
    text = io.StringIO()
    csv.writer(text, delimiter=separator, quoting=quoting, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


@examples(6)
@given(texts=st.lists(WORDS, min_size=ROWS, max_size=ROWS), separator=st.sampled_from("\t,;"))
def test_a_good_table_is_taken_whole(texts, separator):
    rows = [
        ["filepath", "title"],
        *([f"i/{n}.jpg", f"<{n}>{text}"] for n, text in enumerate(texts)),
    ]
    pictures = {f"i/{n}.jpg": content for n, content in enumerate(PICTURES)}
    with folder_of({"t.csv": table(rows, separator), **pictures}) as folder:
        status, said = build(folder, "csv", "--captions", folder / "t.csv")
        assert status == 0, said
        found = check_pairs(folder, status, said, [])
        assert sorted(f["txt"].decode() for f in found.values()) == sorted(r[1] for r in rows[1:])


def csv_command(folder):
    rows = [["filepath", "title"], *([f"i/{n}.jpg", f"<{n}> a, word"] for n in range(ROWS))]
    (folder / "t.csv").write_bytes(table(rows, ","))
    return ["csv", "--captions", folder / "t.csv"]


def cc3m_command(folder):
    captions, report = folder / "cc.tsv", folder / "report.tsv"
    captions.write_text(
        "".join(f'<{n}> "a" word\thttp://x/{n}.jpg\n' for n in range(ROWS)), encoding="utf-8"
    )
    row = "i/{0}.jpg\ttraining\timage/jpeg\t1\t200\thttp://x/{0}.jpg\n"
    report.write_text("".join(map(row.format, range(ROWS))), encoding="utf-8")
    return ["cc3m", "--captions", captions, "--report", report, "--images", folder]


def wit_command(folder):
    columns = ["language", "page_url", "image_url", "page_title", "section_title"]
    columns += ["caption_reference_description", "caption_attribution_description"]
    columns += ["caption_alt_text_description", "attribution_passes_lang_id"]
    columns += ["context_page_description", "context_section_description"]
    rows = [
        ["en", "p", f"http://x/{n}.jpg", "title", "", f'<{n}> a "word"', "", "", "true", "", ""]
        for n in range(ROWS)
    ]
    (folder / "wit.tsv").write_bytes(table([columns, *rows], "\t"))
    return ["wit", "--tables", folder / "wit.tsv", "--images", folder / "i"]


def yfcc_command(folder):
    before, behind = ["u", "n", "d", "d", "c"], ["word", *"tmxyp", "url", *["x"] * 8, "0"]
    rows = ["\t".join([f"{n}", *before, f"<{n}>+a", *behind]) + "\n" for n in range(ROWS)]
    subset, metadata = folder / "subset.tsv", folder / "metadata.tsv"
    subset.write_text("".join(f"{n}\t{n}\t{n:032x}\n" for n in range(ROWS)), encoding="utf-8")
    metadata.write_text("".join(rows), encoding="utf-8")
    return ["yfcc15m", "--subset", subset, "--metadata", metadata, "--images", folder / "i"]


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (csv_command, "t.csv"),
        (cc3m_command, "cc.tsv"),
        (cc3m_command, "report.tsv"),
        (wit_command, "wit.tsv"),
        (yfcc_command, "metadata.tsv"),
        (yfcc_command, "subset.tsv"),
    ],
)
@examples(4)
@given(spoils=SPOILS, packed=st.booleans())
def test_spoilt_tables(command, file, spoils, packed):
    with folder_of({f"i/{n}.jpg": content for n, content in enumerate(PICTURES)}) as folder:
        words, path = command(folder), folder / file
        content = bz2.compress(path.read_bytes()) if packed else path.read_bytes()
        path.write_bytes(spoiled(content, spoils))
        status, said = build(folder, *words)
        found = check_pairs(folder, status, said, [path])
        assert spoils or len(found) == ROWS, said


CLASSES = ["LabelName,DisplayName", *(f'/m/0{n},"Name, <{"abcde"[n]}>"' for n in range(ROWS))]
LABELS = ["ImageID,Source,LabelName,Confidence"]
LABELS += [f"p{'abcde'[n]},verification,/m/0{n},1" for n in range(ROWS)]
DICTIONARY = ["category_index\tcategory_id\tindex_of_parent_category\tcategory name"]
DICTIONARY += [f"{n}\tn0000000{n}\t-1\tname <{'abcde'[n]}>, other" for n in range(ROWS)]
INDICES = [f"p{'abcde'[n]}.jpg {n}:1" for n in range(ROWS)]


@pytest.mark.parametrize("name", ["open-images", "imagenet10k"])
@pytest.mark.parametrize("which", [0, 1])
@examples(3)
@given(spoils=SPOILS)
def test_spoilt_labels(name, which, spoils):
    """A picture comes out with its own label, of its own name."""
    files = ([CLASSES, LABELS], [DICTIONARY, INDICES])[name == "imagenet10k"]
    contents = [("\n".join(lines) + "\n").encode() for lines in files]
    contents[which] = spoiled(contents[which], spoils)
    pictures = {f"i/p{'abcde'[n]}.jpg": content for n, content in enumerate(PICTURES)}
    with folder_of({"classes": contents[0], "labels": contents[1], **pictures}) as folder:
        paths = [folder / "classes", folder / "labels"]
        words = [name, "--classes", paths[0], "--labels", paths[1], "--images", folder / "i"]
        status, said = build(folder, *words, "--max-missing", str(ROWS))
        if status:
            assert any(str(path) in said for path in (*paths, folder / "out")), said
            return
        names = (folder / "out" / "classnames.txt").read_text(encoding="utf-8").split("\n")
        for files in samples(*sorted((folder / "out" / "test").glob("*.tar"))).values():
            number = PICTURES.index(files["jpg"])
            for label in np.flatnonzero(np.load(io.BytesIO(files["npy"]))):
                assert set(re.findall("<([a-e])>", names[label])) <= {"abcde"[number]}, names


@pytest.mark.parametrize(
    ("kind", "img2dataset"), [("tar", False), ("zip", False), ("tar.gz", False), ("tar", True)]
)
@examples(3)
@given(
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=4),
    cut=st.just(1.0) | st.floats(0, 1),
)
def test_spoilt_archives(kind, img2dataset, flips, cut):
    rows = [["filepath", "title"], *([f"{n}.jpg", f"<{n}> a word"] for n in range(ROWS))]
    files = {f"{n}.jpg": content for n, content in enumerate(PICTURES)}
    if img2dataset:
        files |= {f"{n}.json": json.dumps({"url": f"{n}.jpg"}).encode() for n in range(ROWS)}
    with folder_of({"t.csv": table(rows, ",")}) as folder:
        archive = pack(kind, folder, dict(sorted(files.items())))
        content = bytearray(archive.read_bytes())
        for place, change in flips:
            content[int(place * (len(content) - 1))] ^= change
        archive.write_bytes(content[: int(cut * len(content))])
        words = ["--img2dataset" if img2dataset else "--images", archive]
        status, said = build(folder, "csv", "--captions", folder / "t.csv", *words)
        if status:
            assert str(folder) in said, said
            return
        for files in samples(*sorted((folder / "out").glob("*.tar"))).values():
            number = int(TAG.findall(files["txt"].decode())[0])
            picture = next(iter(files[suffix] for suffix in files if suffix != "txt"))
            # A flip inside a picture is its own; it stays the picture it was.
            same = sum(a == b for a, b in zip(picture, PICTURES[number], strict=False))
            assert same > 0.9 * len(picture), number
