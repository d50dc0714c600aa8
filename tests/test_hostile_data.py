"""Samples and archives from anywhere: what cannot be used is passed over, nothing leaves its place."""

import tarfile

import pytest
from data_helpers import as_file, jpeg, member, run, samples, tree, write_files, write_tar
from PIL import Image
from training_helpers import load, train

GOOD = {f"{n}.{s}": c for n in range(24) for s, c in (("jpg", jpeg(n)), ("txt", b"a word"))}


def hostile(path):
    """24 good samples, 4 that can be used all the same and 8 that cannot."""
    with tarfile.open(write_tar(path, GOOD), "a") as tar:
        for key, image, caption in (
            ("words", jpeg(1), b"word " * 20_000),
            ("marks", jpeg(1), "\u202e\u0000 café".encode()),
            ("latin", jpeg(1), "café".encode("latin-1")),
            ("utf16", jpeg(1), "cafe".encode("utf-16")),
            ("nothing", b"", b"x"),
            ("half", jpeg(1, (200, 200))[:900], b"x"),
        ):
            member(tar, f"{key}.jpg", image)
            member(tar, f"{key}.txt", caption)
        for key, size in (("bomb", (20_000, 20_000)), ("dwarf", (1, 1))):
            member(tar, f"{key}.png", as_file(Image.new("1", size)))
            member(tar, f"{key}.txt", b"x")
        for key, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            target = "/etc/passwd" if key == "link" else "1.jpg"
            member(tar, f"{key}.jpg", type=kind, linkname=target)
            member(tar, f"{key}.txt", b"x")
        member(tar, "device.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        member(tar, "device.txt", b"x")
        member(tar, "../../up.jpg", jpeg(1))
        member(tar, "../../up.txt", b"x")
    return path


def test_training_passes_over_what_cannot_be_used(tmp_path):
    shard = hostile(tmp_path / "one" / "two" / "00000.tar")
    words = ["--train-data", str(shard), "--train-num-samples", "28", "--epochs", "1"]
    words += ["--workers", "0", "--batch-size", "28"]
    before = tree(tmp_path)
    folder = train(tmp_path, tmp_path / "logs", *words, "--loss", "otter")
    assert load(folder / "epoch_1.pt")["epoch"] == 1
    assert {k: v for k, v in tree(tmp_path).items() if not k.startswith("logs")} == before


def test_pipes(tmp_path):
    """One that fails late gives what it gave; one that gives nothing ends the run with its name."""
    write_tar(tmp_path / "0.tar", GOOD)
    words = ["--train-num-samples", "24", "--dataset-type", "webdataset", "--loss", "otter"]
    words += ["--workers", "0", "--epochs", "1", "--train-data"]
    late = f"pipe:cat {tmp_path / '0.tar'}; sleep 1; exit 3"
    assert load(train(tmp_path, tmp_path / "logs", *words, late) / "epoch_1.pt")["epoch"] == 1
    nothing = "pipe:cat /nowhere/0.tar"
    with pytest.raises(SystemExit, match=nothing):
        train(tmp_path, tmp_path / "logs2", *words, nothing)


def test_a_builder_takes_nothing_from_outside_its_sources(tmp_path):
    """Neither links of an archive nor names that point out of it are followed, in source or output."""
    secret = tmp_path / "secret"
    write_files(secret, {"a.jpg": jpeg(77)})
    place = tmp_path / "one" / "two"
    place.mkdir(parents=True)
    with tarfile.open(place / "images.tar", "w") as tar:
        member(tar, "good.jpg", jpeg(1))
        member(tar, "link.jpg", type=tarfile.SYMTYPE, linkname=str(secret / "a.jpg"))
        member(tar, "hard.jpg", type=tarfile.LNKTYPE, linkname=str(secret / "a.jpg"))
        member(tar, "../../up.jpg", jpeg(2))
        member(tar, "/etc/abs.jpg", jpeg(3))
    rows = ["good.jpg", "link.jpg", "hard.jpg", "../../up.jpg", "/etc/abs.jpg"]
    text = "filepath,title\n" + "".join(f"{row},{n}\n" for n, row in enumerate(rows))
    (place / "t.csv").write_text(text, encoding="utf-8")
    before, out = tree(tmp_path), place / "out"
    words = ["--captions", place / "t.csv", "--images", place / "images.tar", "--output", out]
    assert run("csv", *words) == 0
    found = {s["txt"]: s["jpg"] for s in samples(*out.glob("*.tar")).values()}
    assert found == {b"0": jpeg(1), b"3": jpeg(2), b"4": jpeg(3)}
    after = {k: v for k, v in tree(tmp_path).items() if not k.startswith("one/two/out")}
    assert after == before
