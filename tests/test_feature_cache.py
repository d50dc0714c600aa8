"""``--feature-cache``: training on kept features is training on the data, and nothing stale is used."""

import json
import re
import shutil

import open_clip
import pytest
from training_helpers import load, train

LOCK_TEXT = ["--lock-text", "--lock-text-freeze-layer-norm"]
LOCKS = {
    "image": ["--lock-image"],
    "text": LOCK_TEXT,
    "both": ["--lock-image", *LOCK_TEXT],
}


@pytest.fixture(scope="module")
def model(hf_model, tmp_path_factory):
    """The tiny towers without dropout, in a folder."""
    folder = tmp_path_factory.mktemp("still")
    config = open_clip.get_model_config(hf_model)
    config["vision_cfg"]["timm_drop"] = 0.0
    tower = folder / "tower"
    shutil.copytree(config["text_cfg"]["hf_model_name"], tower)
    bert = json.loads((tower / "config.json").read_text())
    bert |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tower / "config.json").write_text(json.dumps(bert))
    config["text_cfg"] |= {"hf_model_name": str(tower), "hf_tokenizer_name": str(tower)}
    (folder / "tiny-still.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return "tiny-still"


def losses(folder):
    """Every step's logged losses."""
    text = (folder / "run" / "out.log").read_text()
    found = [re.findall(r"([A-Z]\w*_?\w*): ([-\d.e]+) \(", line) for line in text.splitlines()]
    return [
        [(name, float(value)) for name, value in line if "Loss" in name or "loss" in name]
        for line in found
        if line
    ]


def same_run(one, other, tolerance=1e-5):
    pairs = list(zip(losses(one), losses(other), strict=True))
    assert len(pairs) > 5
    for a, b in pairs:
        assert [name for name, _ in a] == [name for name, _ in b]
        for (name, x), (_, y) in zip(a, b, strict=True):
            assert x == pytest.approx(y, abs=tolerance, rel=tolerance), name


@pytest.mark.parametrize("csv", [False, True], ids=["webdataset", "csv"])
@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("loss", ["infonce", "otter"])
def test_same_as_live(pairs, tmp_path, model, loss, lock, csv):
    extra = ["--loss", loss, "--model", model, *LOCKS[lock]]
    live = train(pairs, tmp_path / "live", *extra, csv=csv)
    cache = ["--feature-cache", str(tmp_path / "cache")]
    cached = train(pairs, tmp_path / "cached", *extra, *cache, csv=csv)
    same_run(tmp_path / "live", tmp_path / "cached")
    one, other = (load(path / "epoch_2.pt") for path in (live, cached))
    assert one.keys() == other.keys()
    assert one["state_dict"].keys() == other["state_dict"].keys()
