"""Training data that hold no step, or fewer samples than they seem to: what is said, and when."""

import json
import re
import tarfile

import pytest
from data_helpers import jpeg, write_files, write_tar
from training_helpers import train


def shards(folder, *contents):
    """Shards of the given files each, with sizes.json as the builders write it."""
    sizes = {}
    for n, files in enumerate(contents):
        write_tar(folder / f"{n:05d}.tar", files)
        sizes[f"{n:05d}.tar"] = 12
    (folder / "sizes.json").write_text(json.dumps(sizes))
    last = len(contents) - 1
    return str(folder / f"{{00000..{last:05d}}}.tar") if last else str(folder / "00000.tar")


def good(*numbers):
    return {
        name: content
        for n in numbers
        for name, content in ((f"{n:04d}.jpg", jpeg(n)), (f"{n:04d}.txt", b"a word"))
    }


def run(tmp_path, data, *extra):
    """Train on ``data``; the message of the SystemExit that it ends with."""
    logs = tmp_path / f"logs{len(list(tmp_path.iterdir()))}"
    loss = [] if "--loss" in extra else ["--loss", "otter"]
    with pytest.raises(SystemExit) as error:
        train(tmp_path, logs, "--train-data", data, *loss, *extra)
    assert not list(logs.rglob("*.pt"))
    return str(error.value.code)


CASES = {
    "few": (good(*range(10)), "10 usable samples in 1 shards"),
    "captions in json": (
        {f"{n}.{s}": c for n in range(12) for s, c in (("jpg", jpeg(n)), ("json", b"{}"))},
        "0 usable samples in 1 shards (SHARD); passed over: 12 with no .txt among .jpg, .json",
    ),
    "dotted keys": (
        {f"{n}.v1.{s}": c for n in range(12) for s, c in (("jpg", jpeg(n)), ("txt", b"x"))},
        "12 with no .txt and no image among .v1.jpg, .v1.txt",
    ),
    "other images": (
        {f"{n}.{s}": c for n in range(12) for s, c in (("gif", b"GIF89a"), ("txt", b"x"))},
        "12 with no image among .gif, .txt",
    ),
    "unreadable": (
        {f"{n}.{s}": c for n in range(12) for s, c in (("jpg", b"no"), ("txt", b"x"))},
        "12 with an unreadable image or caption",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss", ["otter", "clip"])
def test_data_without_a_batch_end_the_run_with_shards_and_reasons(tmp_path, case, loss):
    files, expected = CASES[case]
    data = shards(tmp_path / "data", files)
    said = run(tmp_path, data, "--loss", loss, "--workers", "0")
    assert said.startswith("error: --train-data gives no batch of 12: ")
    assert expected.replace("SHARD", data) in said


def test_a_loaders_process_says_it_too_and_names_shards_that_gave_nothing(tmp_path):
    data = shards(tmp_path / "data", good(*range(12)), {})
    (tmp_path / "data" / "00001.tar").write_bytes(b"no tar" * 200)
    said = run(tmp_path, data, "--workers", "2")
    # Which process has the empty shard is a matter of the seed.
    assert re.search("no batch of 12 in loader process [01] of 2: 0 usable samples in 1 sh", said)
    assert "all of 1 shards that gave none" in said and "00001.tar" in said
    assert "Traceback" not in said


def test_drawing_shards_for_ever_ends_too(tmp_path):
    data = shards(tmp_path / "data", CASES["dotted keys"][0], CASES["unreadable"][0])
    resampled = ["--dataset-resampled", "--train-num-samples", "24", "--workers", "0"]
    assert "with no .txt and no image among" in run(tmp_path, data, *resampled)
    # Ten samples are few, but drawn again they make batches.
    data = shards(tmp_path / "more", good(*range(10)))
    words = ["--train-data", data, *resampled, "--loss", "otter"]
    assert list(train(tmp_path, tmp_path / "logs", *words).glob("*.pt"))


def test_what_is_passed_over_is_said_once_an_epoch(tmp_path, caplog):
    files = good(*range(24)) | {"odd.jpg": jpeg(1)} | {"bad.jpg": b"no", "bad.txt": b"x"}
    data = shards(tmp_path / "data", files, good(*range(24, 36)))
    words = ["--train-data", data, "--workers", "0", "--train-num-samples", "36"]
    for loss, times in (("otter", 2), ("clip", 0)):
        caplog.clear()
        train(tmp_path, tmp_path / "logs", *words, "--loss", loss, "--name", loss)
        said = [r.message for r in caplog.records if r.message.startswith("Samples passed over")]
        expected = "1 with no .txt among .jpg; 1 with an unreadable image or caption"
        assert said == [f"Samples passed over: {expected}"] * times


def test_a_shard_that_ends_too_early(tmp_path, caplog):
    data = shards(tmp_path / "data", good(*range(24)), good(*range(24, 36)))
    first = tmp_path / "data" / "00000.tar"
    whole = first.read_bytes()
    sizes = {"00000.tar": 24, "00001.tar": 12}
    (tmp_path / "data" / "sizes.json").write_text(json.dumps(sizes))
    words = ["--train-data", data, "--loss", "otter", "--workers", "0", "--epochs", "1"]
    with tarfile.open(first) as tar:
        middle = tar.getmember("0012.jpg").offset
    # Cut between two files, in the middle of one, and garbled, which tarfile takes for the end.
    for n, content in enumerate(
        (whole[:middle], whole[: middle + 700], whole[:middle] + b"?" * 512 + whole[middle + 512 :])
    ):
        caplog.clear()
        first.write_bytes(content)
        train(tmp_path, tmp_path / "logs", *words, "--name", str(n))
        said = [r.message for r in caplog.records if r.levelname == "WARNING"]
        start = f"1 shards of --train-data end too early: {first}"
        assert (start in said) == (n < 2)
        assert f"Samples passed over: 12 of {first}, which ends too early" in said


def test_good_data_are_not_talked_about(tmp_path, caplog):
    data = shards(tmp_path / "data", good(*range(12)), good(*range(12, 24)))
    train(tmp_path, tmp_path / "logs", "--train-data", data, "--loss", "otter", "--workers", "0")
    assert not [r for r in caplog.records if re.search("passed over|too early", r.message)]


def test_accumulation_beyond_an_epoch(tmp_path):
    data = shards(tmp_path / "data", good(*range(12)), good(*range(12, 24)))
    for loss in ("otter", "clip"):
        said = run(tmp_path, data, "--accum-freq", "3", "--loss", loss)
        assert "--accum-freq 3 is more than the 2 batches of an epoch" in said


def table(folder, rows, header="filepath\ttitle"):
    folder.mkdir()
    write_files(folder, {f"{n}.jpg": jpeg(n) for n in range(rows)})
    lines = [header, *(f"{folder}/{n}.jpg\ta word" for n in range(rows))]
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "t.csv")


def test_a_table_with_less_than_a_batch(tmp_path):
    data = table(tmp_path / "data", 10)
    assert "--train-data has 10 samples, less than a batch" in run(tmp_path, data)
    # open_clip's own training is left as it is: no step, and a checkpoint
    assert train(tmp_path, tmp_path / "clip", "--train-data", data, "--loss", "clip")


@pytest.mark.parametrize(
    ("header", "extra", "message"),
    [
        ("file\ttitle", (), "has no column 'filepath' but 'file', 'title'; see --csv-img-key"),
        ("filepath,title", (), "has its fields separated by ','; pass --csv-separator"),
        ("filepath\ttitle", ("--csv-caption-key", "text"), "has no column 'text'"),
        ("", (), "is empty"),
    ],
)
def test_columns_and_separator_of_a_table(tmp_path, header, extra, message):
    assert message in run(tmp_path, table(tmp_path / "data", 0, header), *extra)


@pytest.mark.parametrize("length", [2, 13])
def test_texts_that_the_text_tower_cannot_take(pairs, tmp_path, hf_model, length):
    """Of two tokens no word is left: all captions would be the same."""
    message = {2: "2 leaves no room for words: .* take 3 or more", 13: "13 is more than the 12"}
    words = ["--model", hf_model, "--force-context-length", str(length)]
    with pytest.raises(SystemExit, match=f"--force-context-length {message[length]}"):
        train(pairs, tmp_path, *words, "--loss", "infonce")


def test_too_few_shards_and_none(tmp_path):
    data = shards(tmp_path / "data", good(*range(12)), good(*range(12, 24)))
    said = run(tmp_path, data, "--workers", "3")
    assert "2 shards for the 3 --workers, and each needs its own; pass --workers 2, or" in said
    assert "build 3: otter-openclip data ... --shards 3" in said
    words = ["--train-data", data, "--loss", "otter", "--epochs", "1"]
    assert list(train(tmp_path, tmp_path / "two", *words, "--workers", "2").glob("*.pt"))
    words += ["--workers", "3", "--dataset-resampled", "--train-num-samples", "36"]
    assert list(train(tmp_path, tmp_path / "drawn", *words).glob("*.pt"))
    said = run(tmp_path, str(tmp_path / "{0..3}.tar"), "--train-num-samples", "9")
    assert "no such file, first" in said and "0.tar" in said
