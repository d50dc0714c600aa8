"""Builders of the zero-shot test sets, on small files in the official formats."""

import gzip
import io

import numpy as np
import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset
from data_helpers import dropped, encoded, jpeg, pack, refused, run, samples, skipped, write_files
from PIL import Image

NAMES = ["Sprenger's tulip", "Ball", "Cucumber, gourd, and melon family", "Kakigōri", "Ball"]
CLASS_ROWS = """/m/0100nhbf,Sprenger's tulip
/m/018xm,Ball
/m/01_xx,"Cucumber, gourd, and melon family"
/g/11bc6sh46d,Kakigōri
/m/02,Ball
"""
LABELS = """ImageID,Source,LabelName,Confidence
000026e7ee790996,verification,/m/018xm,1
000026e7ee790996,verification,/m/0100nhbf,0
000026e7ee790996,crowdsource-verification,/g/11bc6sh46d,1
000026e7ee790996,crowdsource-verification,/m/018xm,1
000062a39995e348,verification,/m/02,0
0000c64e1253d68f,verification,/m/01_xx,1.0
ffff21932da3ed01,verification,/m/02,1
"""
POSITIVES = {"000026e7ee790996": [1, 3], "0000c64e1253d68f": [2], "ffff21932da3ed01": [4]}


@pytest.fixture
def goi(tmp_path):
    """Official files of three images with positives and one without, images in a folder."""
    classes = f"LabelName,DisplayName\n{CLASS_ROWS}".encode()
    files = {f"images/{i}.jpg": jpeg(n) for n, i in enumerate(POSITIVES)}
    return write_files(tmp_path, files | {"classes.csv": classes, "labels.csv": LABELS.encode()})


def build_goi(folder, *extra, images="images", out="out", labels="labels.csv"):
    line = ["open-images", "--classes", folder / "classes.csv", "--labels", folder / labels]
    line += ["--images", folder / images, "--output", folder / out]
    return run(*line, *extra)


def vectors(output):
    stored = samples(*(output / "test").glob("*.tar"))
    arrays = {key: np.load(io.BytesIO(files["npy"])) for key, files in stored.items()}
    return {key: np.flatnonzero(array).tolist() for key, array in arrays.items()}


def test_open_images_official_files(goi):
    assert build_goi(goi, "--shard-size", "2") == 0
    out = goi / "out"
    assert vectors(out) == POSITIVES
    assert (out / "classnames.txt").read_text(encoding="utf-8").splitlines() == NAMES
    assert (out / "test" / "nshards.txt").read_text(encoding="utf-8") == "2\n"
    assert dropped(out) == [] and skipped(out) == {"without a positive label": 1}
    data = build_dataset("wds/goi", root=str(goi / "out"), transform=np.asarray, split="test")
    assert data.classes == NAMES and data.templates == ["a photo of {c}."]
    (images, targets) = zip(*data, strict=True)
    for n, image in enumerate(images):
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(jpeg(n)))))
    assert [np.flatnonzero(target).tolist() for target in targets] == list(POSITIVES.values())
    loader = torch.utils.data.DataLoader(data.batched(2), batch_size=None, num_workers=1)
    assert [tuple(target.shape) for _, target in loader] == [(2, 5), (1, 5)]


def test_other_forms_of_class_and_label_files(goi, capsys):
    rows = ["\t".join([f"{i}.jpg", *map(str, numbers)]) for i, numbers in POSITIVES.items()]
    (goi / "reference").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (goi / "tabs").write_text(LABELS.replace(",", "\t"), encoding="utf-8")
    content = b"\xef\xbb\xbf" + CLASS_ROWS.replace("\n", "\r\n").encode()
    (goi / "classes.csv").write_bytes(content)
    for labels in ("reference", "tabs"):
        assert build_goi(goi, labels=labels, out=f"of {labels}") == 0
        assert vectors(goi / f"of {labels}") == POSITIVES
    (goi / "classes.csv").write_text("\n".join(NAMES) + "\n\n", encoding="utf-8")
    assert build_goi(goi, labels="reference") == 0 and vectors(goi / "out") == POSITIVES
    assert (goi / "out" / "classnames.txt").read_text(encoding="utf-8").splitlines() == NAMES
    refused(capsys, build_goi(goi, out="none"), "has no class ids (/m/...)")


def test_missing_and_undecodable_images(goi, capsys):
    whole, cut, gone = POSITIVES
    (goi / "images" / f"{cut}.jpg").write_bytes(jpeg(1)[:-200])
    file = goi / "images" / f"{gone}.jpg"
    file.unlink()
    refused(capsys, build_goi(goi), "put them in place, or pass --max-missing 1")
    assert dropped(goi / "out") == [(gone, "missing")]
    file.write_bytes(jpeg(2))  # what is put in place after the error is found
    refused(capsys, build_goi(goi), "1 undecodable images")
    file.unlink()
    status, both = build_goi(goi, "--max-missing", "1", out="both"), goi / "both"
    fix = "put them in place and build into a new folder, or pass --max-missing 2"
    refused(capsys, status, f"1 missing, 1 undecodable images, listed in {both}/dropped.tsv; {fix}")
    assert dropped(both) == [(cut, "undecodable"), (gone, "missing")]
    assert not (both / "test" / "nshards.txt").exists()
    assert build_goi(goi, "--max-missing", "2", out="both") == 0
    assert dropped(both) == [(cut, "undecodable"), (gone, "missing")]
    assert vectors(both) == {whole: [1, 3]}


def test_nothing_left_is_an_error(goi, capsys):
    refused(capsys, build_goi(goi, images="classes.csv"), "neither a folder nor an archive")
    (goi / "empty").mkdir()
    status = build_goi(goi, "--max-missing", "100", images="empty")
    refused(capsys, status, "no sample could be kept (3 missing")
    refused(capsys, build_goi(goi, images="nowhere"), "no such folder or archive")


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_a_stem_is_the_whole_name_but_its_suffix(goi, kind):
    whole, other, none = POSITIVES
    files = {f"x/{whole}.PNG": jpeg(0), f"{other}.small.jpg": jpeg(1), f"{other}.txt": b""}
    files |= {f"{whole}.{n:03d}.jpg": jpeg(1) for n in range(9)} | {f"{whole}.txt": b""}
    assert build_goi(goi, "--max-missing", "2", images=pack(kind, goi, files)) == 0
    assert vectors(goi / "out").keys() == {whole}
    assert dropped(goi / "out") == [(other, "missing"), (none, "missing")]


KINDS = [("JPEG", "CMYK"), ("JPEG", "L"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB")]
KINDS += [("PNG", mode) for mode in ("L", "P", "RGBA", "LA", "1")]


@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_modes_and_formats_that_pillow_reads_stay_what_stock_sees(goi, kind, mode):
    content = encoded(7, kind, mode)
    (goi / "images" / "0000c64e1253d68f.jpg").write_bytes(content)  # names lie
    assert build_goi(goi) == 0
    files = samples(goi / "out" / "test" / "0.tar")["0000c64e1253d68f"]
    suffix = "jpg" if kind == "JPEG" else "png"
    assert files.keys() == {suffix, "npy"}
    assert (files[suffix] == content) == (kind in ("JPEG", "PNG"))
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    data = build_dataset("wds/goi", root=str(goi / "out"), transform=np.asarray, split="test")
    images = [image for image, _ in data]
    assert np.array_equal(images[1], expected)


def test_resize_is_torchvisions_and_leaves_small_images_alone(goi):
    from torchvision.transforms import InterpolationMode, Resize

    big = encoded(3, "PNG")  # 24 x 20
    (goi / "images" / "0000c64e1253d68f.jpg").write_bytes(big)
    (goi / "images" / "ffff21932da3ed01.jpg").write_bytes(jpeg(5, (12, 90)))
    assert build_goi(goi, "--resize", "12") == 0
    stored = samples(goi / "out" / "test" / "0.tar")
    assert stored["ffff21932da3ed01"]["jpg"] == jpeg(5, (12, 90))
    image = Image.open(io.BytesIO(stored["0000c64e1253d68f"]["png"]))
    expected = Resize(12, InterpolationMode.BICUBIC)(Image.open(io.BytesIO(big)))
    assert image.size == (14, 12) and np.array_equal(np.asarray(image), np.asarray(expected))
    assert Image.open(io.BytesIO(stored["000026e7ee790996"]["jpg"])).size == (14, 12)


@pytest.mark.parametrize("name", ["cut.tar", "cut.zip", "cut.tar.gz", "labels.csv.bz2"])
def test_damaged_files_are_errors_that_name_them(goi, capsys, name):
    files = {f"test/{i}.jpg": jpeg(n, (90, 90)) for n, i in enumerate(POSITIVES)}
    tar = pack("tar", goi, files).read_bytes()
    cut = {"cut.tar": tar[: len(tar) // 2], "cut.tar.gz": gzip.compress(tar)[:999]}
    cut |= {"cut.zip": b"PK\x03\x04" + bytes(200), "labels.csv.bz2": b"BZh9" + bytes(200)}
    (goi / name).write_bytes(cut[name])
    words = {"labels" if name.startswith("labels") else "images": name}
    refused(capsys, build_goi(goi, **words), f"{name}: damaged or cut short")
    # Beside images a compressed tar is not looked at.
    (goi / name).rename(goi / "images" / f"{name}.tar.gz")
    assert build_goi(goi, out="out2") == 0 and vectors(goi / "out2") == POSITIVES


# With line breaks of Unicode in a name, which is to stay one line.
DICTIONARY = """category_index\tcategory_id\tindex_of_parent_category\tcategory name
0\tn00002452\t-1  thing
1\tn00020827\t-1\tmatter
2\tn00002684\t-1\tobject, physical object
3\tn03168217\t2\tdesk, writing\u2028desk\x85, \x0bécole
4\tn03168218\t2\tdesk
5\tn03168219\t2\tdesk
"""
CLASSES = ["thing", "matter", "object,or physical object", "desk,or writing desk,or école"]
ROWS = """n04162706/n04162706_17303.JPEG\t3:0.9\t2:1\t4:0
n04162706/n04162706_4.JPEG\t1
n02957008/n02957008_4482.JPEG\t0\t5\t2
n00000001/n00000001_1.JPEG\t3:0
x/n04162706_4.JPEG\t2
"""


@pytest.fixture
def tencent(tmp_path):
    files = {f"images/{row.split()[0]}": jpeg(n) for n, row in enumerate(ROWS.splitlines())}
    files |= {"dictionary.txt": DICTIONARY.encode(), "val.txt": ROWS.encode()}
    return write_files(tmp_path, files)


def build_tencent(folder):
    line = ["imagenet10k", "--classes", folder / "dictionary.txt", "--labels", folder / "val.txt"]
    return run(*line, "--images", folder / "images", "--output", folder / "out")


def test_imagenet10k(tencent):
    """Labels of files with confidences, and of others; of two images of one name the first counts."""
    assert build_tencent(tencent) == 0
    expected = {"n04162706_17303": [2, 3], "n04162706_4": [1], "n02957008_4482": [0, 2, 5]}
    assert vectors(tencent / "out") == expected
    assert dropped(tencent / "out") == [("x/n04162706_4.JPEG", "duplicate")]
    names = (tencent / "out" / "classnames.txt").read_text(encoding="utf-8").splitlines()
    assert names == [*CLASSES, "desk", "desk"]
    data = build_dataset("wds/x", root=str(tencent / "out"), transform=None, split="test")
    assert data.classes == names
    assert skipped(tencent / "out") == {"without a positive label": 1}


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("labels.csv", "/m/02,1", "/m/zzz,1", "csv:8: label /m/zzz is outside the class list"),
        ("labels.csv", "/m/02,1", "/m/02,0.8", "labels.csv:8: confidence '0.8'"),
        ("labels.csv", "Confidence", "Score", "labels.csv:1: has no column 'Confidence'"),
        ("classes.csv", "46d,Kakigōri", "46d,", "classes.csv:5: empty class name"),
        ("classes.csv", "/m/02,Ball", "/m/018xm,Ball", "classes.csv:6: class /m/018xm again"),
        ("classes.csv", "tulip", "tulip, x", "classes.csv:2: expected a class id and a name"),
        ("val.txt", "\t5\t", "\t6\t", "val.txt:3: label 6 is outside the class list of 6 (0 to 5)"),
        ("val.txt", "\t5\t", "\tdesk\t", "val.txt:3: 'desk' is neither a class index nor"),
        ("dictionary.txt", "2\tdesk\n5", "2\tdesk\n7", "dictionary.txt:7: class 7 where 5 is due"),
        ("dictionary.txt", "n00020827\t-1\t", "", "dictionary.txt:3: '1\\tmatter' is not index"),
    ],
)
def test_errors_name_file_and_line(goi, tencent, capsys, file, old, new, message):
    path = goi / file  # the folder of both
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    refused(capsys, (build_goi if file.endswith("csv") else build_tencent)(goi), message)
    assert not (goi / "out").exists()
