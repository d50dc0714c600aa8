"""The benchmarks on frozen towers: their draws, halves and figures, and all of them on tiny towers."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from data_helpers import samples
from test_demo import single_label

from benchmarks import common, data_efficiency, efficiency_runs, forgetting
from benchmarks.efficiency_runs import HALVES, Run, Source, draw
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


@pytest.mark.parametrize("single", [False, True])
def test_halves_share_no_image_and_have_a_vector_for_each(pairs, labelled, tmp_path, single):
    folder = single_label(labelled, tmp_path / "single") if single else labelled
    source = Source("photos", pairs, folder, tmp_path)
    whole = samples(folder / "test" / "0.tar").values()
    parts = [list(samples(source.halves[h] / "test" / "0.tar").values()) for h in HALVES]
    pictures = [sample["png"] for part in parts for sample in part]
    assert sorted(pictures) == sorted(sample["png"] for sample in whole)
    for part, half in zip(parts, HALVES, strict=True):
        vectors = [np.load(io.BytesIO(sample["npy"])) for sample in part]
        assert {int(vector.sum()) for vector in vectors} == {1 if single else 2}
        assert source.shares[half] == np.stack(vectors).any(axis=0).mean()
        assert (
            single
            or (source.halves[half] / "dataset_type.txt").read_text(encoding="utf-8")
            == "multilabel"
        )


def test_shards_hold_the_drawn_pairs(pairs, labelled, tmp_path):
    source = Source("photos", pairs, labelled, tmp_path)
    drawn = draw(72, 10, 0.4, 0)
    source.write(tmp_path / "drawn", drawn)
    contents = []
    for path in sorted((tmp_path / "drawn").glob("*.tar")):
        with tarfile.open(path) as tar:
            contents += [tar.extractfile(member).read() for member in tar]
    expected = {(source.pairs[image][1], source.pairs[caption][2]) for image, caption in drawn}
    assert set(zip(contents[::2], contents[1::2], strict=True)) == expected
    with pytest.raises(ValueError, match=r"--data more: no images with a .txt in the \*.tar of"):
        Source("more", labelled, labelled, tmp_path)


def test_paired_gains_by_hand():
    results = {
        RUN._replace(loss=loss, seed=seed): {
            metric: value for metric in data_efficiency.METRICS.values()
        }
        for loss, values in (("otter", (0.5, 0.7, 0.1)), ("infonce", (0.4, 0.8)))
        for seed, value in enumerate(values)
        for metric in ["mAP"]
    }
    otter, infonce = data_efficiency.rows(results, results)
    assert otter["seeds"] == 3 and otter["ahead"] == 1
    assert otter["gain"] == pytest.approx((0.0, np.sqrt(200)), abs=1e-3)
    assert infonce["mAP"] == pytest.approx((60, 28.284)) and infonce["gain"] == (0.0, 0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory, towers):
    folder = tmp_path_factory.mktemp("model")
    return make_towers(folder / "towers", image_size=32, context_length=8, **towers)


def test_a_small_study(model, pairs, labelled, tmp_path, monkeypatch):
    for name, value in {
        "LOSSES": ("infonce", "otter"),
        "TUNED_NOISE": (0.0,),
        "ABLATIONS": {"lambda 0.04": ("--sinkhorn-lambda", "0.04")},
        "MOST_PAIRS": ("lambda 0.04",),
        "ABLATION_SEEDS": 1,
        "LABELS": {"infonce": "InfoNCE", "otter": "OTTER"},
        "IMAGE": {"train_image": 32, "batch": 12, "steps": 2},
        "IMAGE_LRS": (1e-3,),
        "GLYPHS": (24, 8),
    }.items():
        monkeypatch.setattr(data_efficiency, name, value)
    other = single_label(labelled, tmp_path / "other")
    line = f"--output {tmp_path}/out --towers {model} --data photos={pairs},{labelled} --glyphs"
    line += " --pairs 24 99 --tuning-pairs 36 --batch 12 --seeds 2 --noise 0 0.4 --lrs 1e-2"
    line += f" --steps 2 3 --scales 2 --decays 0.2 1 --course 2 5 --transfer other={other}"
    words = [*line.split(), "--train-image"]
    with monkeypatch.context() as patch:
        patch.setattr(efficiency_runs.Workplace, "do", stop_after(5))
        with pytest.raises(KeyboardInterrupt):
            data_efficiency.main(words)
    path = tmp_path / "out" / "runs.jsonl"
    assert path.read_text(encoding="utf-8").count("result") == 5
    path.write_bytes(path.read_bytes()[:-9])  # a torn line is run again
    assert data_efficiency.main(words) == 0
    report = json.loads((tmp_path / "out" / "data_efficiency.json").read_text(encoding="utf-8"))
    assert [row["pairs"] for row in report["photos"]].count(72) == 4  # as many as there are
    assert all(row["seeds"] == 2 and row["half"] == "test" for row in report["photos"])
    assert {row["steps"] for row in report["steps"]} == {2, 5}
    assert {row["data"] for row in report["ablation: OTTER, 3 times the steps"]} == {
        "photos",
        "glyphs",
        "other",
    }
    assert report["ablation: InfoNCE"][0]["gain"] == [0.0, 0.0]
    assert len(report["image tower"]) == 2 and "other, tuned on photos" in report
    assert len(report["other, tuned at 72 pairs"]) == 2 and len(report["glyphs"]) == 4
    assert str(tmp_path) not in json.dumps(report)
    monkeypatch.setattr(efficiency_runs.Workplace, "do", stop_after(0))
    assert data_efficiency.main(words) == 0  # all is there
    with pytest.raises(KeyboardInterrupt):
        data_efficiency.main([*words, "--course", "4"])


def stop_after(count):
    """Training that is interrupted after so many runs."""
    stock, done = efficiency_runs.Workplace.do, []

    def do(self, run):
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(run)
        return stock(self, run)

    return do


def test_forgetting(model, pairs, labelled, monkeypatch, capsys):
    """The second model alone is the run's own; half of it is between the two."""
    saved = {}
    monkeypatch.setattr(common, "save", lambda name, found: saved.update(found))
    folders = f"{pairs},{labelled}"
    line = f"--towers {model} --first {folders} --second {folders}"
    words = [*line.split(), "--pairs", "48", "24", "--batch", "12", "--steps", "3", "--seeds", "1"]
    assert forgetting.main(words) == 0
    assert len(saved["rows"]) == 5 and "otter" in capsys.readouterr().out
    assert all(0 < row[name] <= 100 for row in saved["rows"] for name in ("first", "second"))
    first, second = (
        {"w": torch.zeros(2), "n": torch.tensor(1)},
        {"w": torch.ones(2), "n": torch.tensor(3)},
    )
    average = forgetting.averaged(first, second, 0.25)
    assert average["w"].tolist() == [0.25, 0.25] and average["n"] == 3
