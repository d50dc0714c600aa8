"""Training data that hold no step, or fewer samples than they seem to: what is said, and when."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
from data_helpers import jpeg, write_files, write_tar
from open_clip_train.data import CsvDataset
from PIL import Image
from training_helpers import parse_args, train

from otter_openclip.training import table_check, watch


def shards(folder, *contents):
    """Shards of the given files each, with sizes.json as the builders write it."""
    tars = [write_tar(folder / f"{n:05d}.tar", files) for n, files in enumerate(contents)]
    sizes = {tar.name: 12 for tar in tars}
    (folder / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
    last = len(contents) - 1
    return str(folder / f"{{00000..{last:05d}}}.tar") if last else str(tars[0])


def good(*numbers):
    return {f"{n}.{s}": c for n in numbers for s, c in (("jpg", jpeg(n)), ("txt", b"a word"))}


def run(tmp_path, data, *extra):
    """Train on ``data``; the message of the SystemExit that it ends with."""
    logs = tmp_path / f"logs{len(list(tmp_path.iterdir()))}"
    with pytest.raises(SystemExit) as error:
        train(tmp_path, logs, "--train-data", data, "--loss", "otter", *extra)
    assert not list(logs.rglob("*.pt"))
    return str(error.value.code)


UNREADABLE = {f"{n}.{s}": c for n in range(12) for s, c in (("jpg", b"no"), ("txt", b"x"))}
NO_BATCH = "error: --train-data gives no batch of 12"


@pytest.mark.parametrize(("files", "loss"), [(good(*range(10)), "otter"), (UNREADABLE, "clip")])
def test_data_without_a_batch_end_the_run_with_what_looks_into_them(tmp_path, files, loss):
    data = shards(tmp_path / "data", files)
    said = run(tmp_path, data, "--loss", loss)
    assert said.startswith(f"{NO_BATCH} from 1 shards ({data}); otter-openclip data inspect")


def test_a_loaders_process_says_it_too(tmp_path):
    data = shards(tmp_path / "data", good(*range(12)), {})
    (tmp_path / "data" / "00001.tar").write_bytes(b"no tar" * 200)
    said = run(tmp_path, data, "--workers", "2")
    # Which process has the empty shard is a matter of the seed.
    assert re.match(rf"{NO_BATCH} in loader process [01] of 2 from 1 shards \(.*00001.tar\)", said)
    assert "Traceback" not in said


def test_drawing_shards_for_ever_ends_too(tmp_path, monkeypatch):
    data = shards(tmp_path / "data", UNREADABLE, UNREADABLE)
    resampled = ["--dataset-resampled", "--train-num-samples", "24"]
    with monkeypatch.context() as patch:
        patch.setattr(watch, "_BUFFER", 50)  # thousands of shards would be drawn
        assert f"{NO_BATCH} from 2 shards" in run(tmp_path, data, *resampled)
    # Ten samples are few, but drawn again they make batches.
    data = shards(tmp_path / "more", good(*range(10)))
    words = ["--train-data", data, *resampled, "--loss", "otter", "--epochs", "1"]
    assert list(train(tmp_path, tmp_path / "logs", *words).glob("*.pt"))


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """The files that say how many samples shards have, below the current folder."""
    monkeypatch.chdir(tmp_path)
    a, b = b'{"0.tar": 16, "1.tar": 16}', b'{"0.tar": 64, "1.tar": 64, "2.tar": 7}'
    files = {"a/sizes.json": a, "b/sizes.json": b, "all/__len__": b"5", "broken/sizes.json": b"{"}
    write_files(tmp_path, files)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("loss", ["clip", "otter"])
def test_each_shard_counts_as_the_file_beside_it_says(loss):
    """open_clip takes the first one's numbers for all, where shards are called alike."""
    a, b = "a/{0..1}.tar", "b/{0..2}.tar"
    for data, count in {f"{a}::{b}": 167, f"{b}::{a}": 167, f"{a}::all/0.tar": 37}.items():
        assert parse_args("--loss", loss, "--train-data", data).train_num_samples == count
    data = ["--loss", loss, "--train-data", f"{a}::c/0.tar"]
    assert parse_args(*data, "--train-num-samples", "9").train_num_samples == 9


UNCOUNTED = {
    "a/{0..2}.tar": "a/sizes.json gives no number of samples: '2.tar'",
    "a/0.tar::c/0.tar": "c/sizes.json is missing, which other shards have",
    "broken/0.tar": "broken/sizes.json gives no number of samples: Expecting",
}


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("data", UNCOUNTED)
def test_a_shard_that_is_not_counted_is_one_line(data, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_args("--train-data", data)
    said = capsys.readouterr().err
    assert f"--train-data {data}: {UNCOUNTED[data]}" in said and "--train-num-samples N" in said


def table(folder, rows, header="filepath\ttitle"):
    folder.mkdir()
    write_files(folder, {f"{n}.jpg": jpeg(n) for n in range(rows)})
    lines = [header, *(f"{folder}/{n}.jpg\ta word" for n in range(rows))]
    (folder / "t.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "t.csv")


def test_an_epoch_without_a_step(tmp_path):
    data = table(tmp_path / "data", 10)
    assert "--train-data has 10 samples, less than a batch" in run(tmp_path, data)
    said = run(tmp_path, data, "--batch-size", "5", "--accum-freq", "3")
    assert "--accum-freq 3 is more than the 2 batches of an epoch" in said
    # open_clip's own training is left as it is: no step, and a checkpoint
    assert train(tmp_path, tmp_path / "clip", "--train-data", data, "--loss", "clip")


def test_what_open_clip_says_of_data_is_one_line(tmp_path):
    said = run(tmp_path, table(tmp_path / "data", 3, "file\ttitle"))
    assert "/t.csv has no 'filepath'; see --csv-img-key, --csv-caption-key and" in said
    data = shards(tmp_path / "shards", good(*range(12)), good(*range(12, 24)))
    said = run(tmp_path, data, "--workers", "3")
    assert f"--train-data {data}: number of shards must be >= total workers" in said
    said = run(tmp_path, data, "--val-data", str(tmp_path / "no.tar"))
    assert f"--val-data {tmp_path}/no.tar: {tmp_path}/no.tar: no such file; correct" in said
    said = run(tmp_path, table(tmp_path / "rows", 12), "--val-data", "no.csv")
    assert " or --val-data no.csv: [Errno 2] No such file or directory: 'no.csv'" in said
    said = run(tmp_path, str(tmp_path / "{0..3}.tar"), "--train-num-samples", "9")
    assert NO_BATCH in said and "0.tar" in said


ROWS = {
    "none.jpg\ta word": "none.jpg: no such file; a path counts from the current folder",
    "page.jpg\ta word": "page.jpg: unreadable image: not an image that Pillow can read",
    "cut.jpg\ta word": "cut.jpg: unreadable image: ",
    "cut.bmp\ta word": "cut.bmp: unreadable image: ",
    "deep.png\ta word": "deep.png: 16-bit or float image (mode I;16)",
    ".\ta word": ".: Is a directory",
    "0.jpg\tNA": "no caption, or one that pandas takes for none (NA, null)",
    '0.jpg\t"a word\n0.jpg\ta "word"': "a quotation mark joins several rows into one; double it",
}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_that_cannot_be_used_is_named_before_the_first_step(tmp_path, monkeypatch, row):
    data = Path(table(tmp_path / "data", 24))
    monkeypatch.chdir(data.parent)
    Path("page.jpg").write_text("<html>", encoding="utf-8")
    Path("cut.jpg").write_bytes(jpeg(0)[:-9])
    Image.new("RGB", (8, 8)).save("cut.bmp")
    Path("cut.bmp").write_bytes(Path("cut.bmp").read_bytes()[:-9])
    Image.new("I;16", (8, 8), 4000).save("deep.png")
    whole = data.read_text(encoding="utf-8")
    data.write_text(f"{whole}{row}\n", encoding="utf-8")
    said = run(tmp_path, str(data), "--loss", "clip" if "none" in row else "otter")
    assert f"--train-data {data}: row 25 below the header: {ROWS[row]}" in said
    assert len(said.splitlines()) == 1
    if "NA" in row:  # as data for validation, which comes after the first epoch
        Path("train.csv").write_text(whole, encoding="utf-8")
        assert f"--val-data {data}: row 25" in run(tmp_path, "train.csv", "--val-data", str(data))


def test_a_picture_that_is_damaged_inside_is_named(tmp_path):
    """A step finds it: of pictures with a good end no more than the header is read before."""
    data, file = table(tmp_path / "data", 24), tmp_path / "data" / "7.jpg"
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    content = file.read_bytes()
    file.write_bytes(content[:2000] + bytes(100) + content[2100:])
    for workers in "01":
        said = run(tmp_path, data, "--workers", workers)
        assert said.startswith(f"error: {file}: unreadable image: ")
        assert said.endswith("--resume latest goes on from the last checkpoint")


def test_rows_that_a_quotation_mark_joins_are_told_from_captions_of_several_lines(tmp_path):
    file = tmp_path / "t.csv"
    rows = ["filepath,title", '0.jpg,"a cat, or', 'a dog, asleep"', '1.jpg,"a cat', '2.jpg,a dog"']
    file.write_text("\n".join(rows), encoding="utf-8")
    said = run(tmp_path, str(file), "--csv-separator", ",", "--batch-size", "2")
    assert "row 2 below the header: a quotation mark joins several rows" in said


def test_ranks_share_out_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(table_check, "_AT_ONCE", 3)
    seen = []
    monkeypatch.setattr(table_check, "_picture_fault", seen.append)
    rows = CsvDataset(table(tmp_path / "data", 23), None, "filepath", "title")
    for rank in range(2):
        args = Namespace(rank=rank, world_size=2, csv_separator="\t")
        assert list(table_check._faults(rows, args)) == []
        assert len(seen) == (12, 23)[rank]
    assert sorted(seen) == sorted(rows.images)


@pytest.mark.parametrize("text", ["caf\xe9", "a\tb\tc", '"open'])
def test_a_table_that_cannot_be_read_below_its_header(tmp_path, text):
    data = Path(table(tmp_path / "data", 24))
    data.write_bytes(data.read_bytes() + f"x.jpg\t{text}\n".encode("latin-1"))
    assert f"error: --train-data {data}: " in run(tmp_path, str(data))
