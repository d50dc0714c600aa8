"""The benchmark of data efficiency: its draws and keys, and all of it on tiny towers."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_towers import image_tower, text_folder

from benchmarks import data_efficiency, efficiency_report, efficiency_runs, forgetting
from benchmarks.efficiency_runs import Run, draw, halves, last_logged
from otter_openclip.compare.dataset import write_tar
from otter_openclip.model_folders.towers import make_towers

RUN = Run("photos", 36, 0.4, 0, "otter", 1e-2, 3, 2.0, 0.2, 12)


def test_draws_are_subsets_and_only_the_share_is_shuffled():
    clean = draw(200, 100, 0.0, 1)
    assert all(image == caption for image, caption in clean) and len(set(clean)) == 100
    assert draw(200, 50, 0.0, 1) == clean[:50] and draw(200, 100, 0.0, 2) != clean
    fifth, half = draw(200, 100, 0.2, 1), draw(200, 100, 0.5, 1)
    for drawn, count in ((fifth, 20), (half, 50)):
        images, captions = zip(*drawn, strict=True)
        assert list(images) == [image for image, _ in clean]
        assert Counter(captions) == Counter(images)  # a permutation
        assert sum(image != caption for image, caption in drawn) == count
    wrong = [{image for image, caption in drawn if image != caption} for drawn in (fifth, half)]
    assert wrong[0] < wrong[1]


def test_halves_share_no_image():
    parts = halves(31)
    assert sorted([*parts["val"], *parts["test"]]) == list(range(31))
    assert np.array_equal(parts["val"], halves(31)["val"])


def test_what_the_log_says_of_the_last_step():
    line = (
        "Train Epoch: 0 [{}/36 (3%)] Data (t): 0.001 Batch (t): 0.012, 1/s LR: 0.01 Loss: {} (9.0)"
    )
    text = "\n".join([line.format(12, 5.0), line.format(36, "1.5e-05"), "done"])
    assert last_logged(text) == {"loss": 1.5e-5, "step_seconds": 0.012}
    assert last_logged("nothing") == {}


def test_a_torn_line_is_run_again(tmp_path):
    results = data_efficiency.Results(tmp_path / "runs.jsonl")
    results.add("a", {"x": 1})
    results.add("b", {"x": 2})
    content = results.path.read_bytes()
    results.path.write_bytes(content[:-9])
    results = data_efficiency.Results(results.path)
    assert results.found == {"a": {"x": 1}}
    results.add("b", {"x": 3})
    assert data_efficiency.Results(results.path).found == {"a": {"x": 1}, "b": {"x": 3}}


def test_paired_differences_by_hand():
    def result(value):
        return {"student": {"test": {"mAP": value}}}

    found = [
        (RUN._replace(loss=loss, seed=seed), result(value))
        for loss, values in (("otter", (0.5, 0.7, 0.1)), ("infonce", (0.4, 0.8)))
        for seed, value in enumerate(values)
    ]
    (row,) = efficiency_report.differences(found, "mAP", "infonce")
    assert row["seeds"] == 2 and row["ahead"] == 1
    assert row["gain"] == pytest.approx((0.0, np.sqrt(200)), abs=1e-3)


def single_label(labelled: Path, folder: Path, classes: int | None = None) -> Path:
    """The evaluation set ``labelled`` with only the first class of each picture, as a number."""
    shutil.copytree(labelled, folder)
    (folder / "dataset_type.txt").unlink()  # clip_benchmark's default
    if classes is not None:
        names = (folder / "classnames.txt").read_text().splitlines()[:classes]
        (folder / "classnames.txt").write_text("\n".join(names))
    with tarfile.open(labelled / "test" / "0.tar") as tar:
        contents = [tar.extractfile(member).read() for member in tar]
    samples = [
        {"png": image, "cls": str(np.load(io.BytesIO(vector)).argmax()).encode()}
        for image, vector in zip(contents[::2], contents[1::2], strict=True)
    ]
    write_tar(folder / "test" / "0.tar", samples)
    return folder


def test_a_class_a_picture_becomes_a_vector(labelled, tmp_path):
    assert data_efficiency.as_multilabel(labelled, tmp_path) == labelled
    single = single_label(labelled, tmp_path / "single")
    copy = data_efficiency.as_multilabel(single, tmp_path)
    assert data_efficiency.as_multilabel(single, tmp_path) == copy != single
    with tarfile.open(copy / "test" / "0.tar") as new, tarfile.open(single / "test/0.tar") as old:
        made, given = ([tar.extractfile(m).read() for m in tar] for tar in (new, old))
    assert made[::2] == given[::2]
    vectors = [np.load(io.BytesIO(content)) for content in made[1::2]]
    assert all(vector.sum() == 1 for vector in vectors)
    assert [str(vector.argmax()).encode() for vector in vectors] == given[1::2]
    few = single_label(labelled, tmp_path / "few", classes=2)
    with pytest.raises(ValueError, match=r"sample \d+ needs an image and a .cls from 0 to 1,"):
        data_efficiency.as_multilabel(few, tmp_path)


@pytest.fixture(scope="module")
def words(tmp_path_factory, pairs, labelled):
    """A small study's command line."""
    folder = tmp_path_factory.mktemp("study")
    text_folder(folder / "text")
    torch.save(image_tower("test_resnet").state_dict(), folder / "image.pt")
    parts = {"image_weights": folder / "image.pt", "text": folder / "text", "image_size": 32}
    make_towers(folder / "towers", image="test_resnet", context_length=8, **parts)
    line = f"--output {folder}/out --towers {folder}/towers --data photos={pairs},{labelled}"
    line += " --pairs 24 99 --tuning-pairs 36 --batch 12 --seeds 2 --noise 0 0.4"
    line += " --lrs 1e-2 --steps 2 3 --scales 2 --decays 0.2 1 --course 2 5"
    line += f" --transfer other={single_label(labelled, folder / 'other')}"
    line += (
        " --train-image --image-size-trained 32 --image-batch 12 --image-steps 2 --image-lrs 1e-3"
    )
    return [*line.split(), "--image-seeds", "1"]


def test_a_small_study(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_efficiency, "LOSSES", ("infonce", "otter"))
    monkeypatch.setattr(data_efficiency, "TUNED_NOISE", (0.4,))
    monkeypatch.setattr(
        data_efficiency, "ABLATIONS", {"lambda 0.04": ("--sinkhorn-lambda", "0.04")}
    )
    monkeypatch.setattr(data_efficiency, "MOST_PAIRS", ("lambda 0.04",))
    monkeypatch.setattr(data_efficiency, "ABLATION_SEEDS", 1)
    out = tmp_path / "out"
    words = [*words, "--output", str(out)]
    assert data_efficiency.main([*words, "--hours", "0"]) == 0
    assert "missing: photos: tune, noise 40%: 6 of 6 runs" in capsys.readouterr().out
    assert data_efficiency.main(words) == 0
    assert "missing" not in capsys.readouterr().out

    keys = [
        json.loads(line)["key"] for line in (out / "runs.jsonl").read_text().split("\n") if line
    ]
    assert len(set(keys)) == len(keys)
    report = json.loads((out / "report" / "data_efficiency.json").read_text())
    assert report["check"]["photos"]["largest difference"] < 1e-6
    assert [row["pairs"] for row in report["final"]].count(72) == 4  # as many as there are
    assert all(row["seeds"] == 2 for row in report["final"])
    assert {row["steps"] for row in report["course"]} == {2, 5}
    assert len(report["image"]) == 2 and "OTTER, lambda 0.04" in report["ablations"]
    most = report["ablations"]["OTTER, 3 times the steps"]
    assert {row["data"] for row in most} == {"photos", "other"}
    assert all(row["pairs"] == 72 and row["steps"] in (6, 9) for row in most)
    assert report["ablations"]["InfoNCE"][0]["mAP gained"] == [0.0, 0.0]
    elsewhere = {title: len(rows) for title, rows in report["tuned elsewhere"].items()}
    assert elsewhere == {
        "other, tuned on photos": 4,
        "photos, tuned at 72 pairs": 2,
        "other, tuned at 72 pairs": 2,
    }
    assert set(elsewhere) < set(report["differences"]["mAP, infonce"])
    assert report["check"]["other"]["largest difference"] < 1e-6
    assert str(tmp_path) not in json.dumps(report)
    page = (out / "report" / "data_efficiency.md").read_text()
    assert "| photos | 36 | 40% | OTTER | exp(2) | 0.01 |" in page and "softmax" in page
    for name in ("data_efficiency.png", "data_efficiency-steps.png"):
        assert 10_000 < (out / "report" / name).stat().st_size < 300_000

    def never(*_, **__):
        raise AssertionError("run again")

    monkeypatch.setattr(efficiency_runs.train, "main", never)
    assert data_efficiency.main(words) == 0  # all is there
    with pytest.raises(RuntimeError, match="run again"):
        data_efficiency.main([*words, "--course", "4"])
    # What is missing of one stage does not hide the next ones.
    capsys.readouterr()
    assert data_efficiency.main([*words, "--course", "2", "4", "--hours", "0"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "missing" in line]
    assert said == ["missing: photos: steps: 2 of 4 runs"]
    left = json.loads((out / "report" / "data_efficiency.json").read_text())
    assert left["ablations"] == report["ablations"]
    # Results of other towers, data or code are not taken for these.
    monkeypatch.setattr(efficiency_runs, "code_digest", lambda: "changed")
    with pytest.raises(RuntimeError, match="run again"):
        data_efficiency.main(words)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--transfer", "more"], "--transfer more must be NAME=EVAL_DIR, and the data of --ablate"),
        (["--data", "more"], "--data more must be NAME=TRAIN_DIR,EVAL_DIR"),
        (["--data", "more=nowhere,nowhere"], r"--data more: no \*.tar in nowhere"),
        (["--batch", "37"], "--batch 37 is more than 24 pairs of photos"),
        (["--towers", "nowhere"], "--towers nowhere is not a folder that otter-openclip towers"),
    ],
)
def test_what_is_refused(words, extra, message):
    with pytest.raises(ValueError, match=message):
        data_efficiency.main([*words, *extra])


def test_weights_that_diverged_count_nothing(words, tmp_path):
    settings = data_efficiency.parse(words)
    source, _ = data_efficiency.sources(settings, tmp_path)
    judge = efficiency_runs.Judge(source, Path(settings.towers), tmp_path / "kept.pt")
    state = judge.model.state_dict()
    assert judge.measure(state)["test"]["mAP"] > 0
    state["visual.head.proj.weight"] = torch.full_like(state["visual.head.proj.weight"], np.nan)
    assert set(judge.measure(state)["test"].values()) == {0.0}


def test_shards_hold_the_drawn_pairs(pairs, labelled, tmp_path):
    source = efficiency_runs.Source("photos", pairs, labelled)
    drawn = draw(72, 10, 0.4, 0)
    source.write(tmp_path / "drawn", drawn)
    found = []
    for path in sorted((tmp_path / "drawn").glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [io.BytesIO(tar.extractfile(member).read()).getvalue() for member in tar]
    samples = source.samples
    expected = {(samples[image][1], samples[caption][2]) for image, caption in drawn}
    assert set(zip(found[::2], found[1::2], strict=True)) == expected


def test_forgetting_averages_weights_and_reports_means():
    first, second = (
        {"w": torch.zeros(2), "n": torch.tensor(1)},
        {"w": torch.ones(2), "n": torch.tensor(3)},
    )
    found = forgetting.averaged(first, second, 0.25)
    assert found["w"].tolist() == [0.25, 0.25] and found["n"] == 3
    settings = {"loss": "otter", "lr": 0.001, "steps": 30, "share": 0.5}
    rows = [settings | {"first": {"test": m}, "second": {"test": 2 * m}} for m in (10.0, 20.0)]
    assert forgetting.report(rows).splitlines()[1].split()[-3:] == ["15.0", "30.0", "2"]


def test_glyphs_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data_efficiency, "GLYPHS", (24, 8))
    made = data_efficiency.glyph_source(tmp_path / "glyphs")
    assert len(made.samples) == 24 and made.name == "glyphs"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    assert data_efficiency.glyph_source(tmp_path / "glyphs").digest == made.digest
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
