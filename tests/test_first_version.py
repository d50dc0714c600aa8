"""Checkpoints of the first version, which had its entry in the optimizer's state: resumed, exported."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from conftest import COLOURS, SHAPES
from training_helpers import load, train

from otter_openclip.checkpoints.export import export_checkpoint
from otter_openclip.checkpoints.layout import upgraded

MAJOR = 4 if find_spec("open_clip.task") else 3
FOLDER = Path(__file__).parent / "saved"
SAVED = FOLDER / f"first_version_{MAJOR}x.pt"
FLAGS = ["--loss", "otter", "--model", "tiny-saved", "--beta1", "0.9", "--beta2", "0.98"]
FLAGS += ["--eps", "1e-6", "--lr", "1e-2"]


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory):
    """The run's model: its weights come from the checkpoint."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("saved")
    tower = folder / "tower"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"intermediate_size": 8, "max_position_embeddings": 12, "vocab_size": 14}
    BertModel(BertConfig(**sizes), add_pooling_layer=False).save_pretrained(tower)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *COLOURS, *SHAPES]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(tower)
    vision = {"image_size": 32, "layers": 1, "width": 8, "head_width": 8, "patch_size": 16}
    text = {"hf_model_name": str(tower), "hf_tokenizer_name": str(tower)}
    text |= {"hf_proj_type": "linear", "context_length": 8}
    text["hf_pooler_type"] = "mean_pooler"
    model = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    (folder / "tiny-saved.json").write_text(json.dumps(model))
    open_clip.add_model_config(folder / "tiny-saved.json")


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="its text tower rounds otherwise, and Adam makes steps of gradients that are rounding",
)
def test_resume_goes_on_as_the_first_version_did(pairs, tmp_path):
    """Student, teacher and second scale of the next epoch; the file it writes has the new layout."""
    path = train(pairs, tmp_path, *FLAGS, "--resume", str(SAVED)) / "epoch_2.pt"
    checkpoint = load(path)
    expected = np.load(FOLDER / f"first_version_{MAJOR}x_epoch_2.npz")
    found = {f"student/{k}": v for k, v in checkpoint["state_dict"].items()}
    found |= {f"teacher/{k}": v for k, v in checkpoint["state_dict_ema"].items()}
    found["scale"] = checkpoint["otter"]["distill_logit_scale"]
    assert found.keys() == set(expected.files)
    # Of another machine, and Adam amplifies rounding.
    for key, value in found.items():
        np.testing.assert_allclose(value.numpy(), expected[key], rtol=1e-3, atol=1e-4, err_msg=key)
    assert checkpoint["optimizer"].keys() == {"state", "param_groups"}
    # Without what the entry restores the comparison would fail.
    before = load(SAVED)
    teacher = upgraded(before)["state_dict_ema"]
    moved = [abs(v.numpy() - expected[f"teacher/{k}"]).max() for k, v in teacher.items()]
    assert max(moved) > 1e-2


def test_the_same_resume_from_the_new_layout_is_bit_identical(pairs, tmp_path):
    torch.save(upgraded(load(SAVED)), tmp_path / "upgraded.pt")
    results = []
    for name, path in (("old", SAVED), ("new", tmp_path / "upgraded.pt")):
        folder = train(pairs, tmp_path / name, *FLAGS, "--resume", str(path))
        results.append(load(folder / "epoch_2.pt"))
    for key in ("state_dict", "state_dict_ema"):
        for name, value in results[0][key].items():
            assert torch.equal(value, results[1][key][name])


@pytest.mark.parametrize("major", [3, 4])
@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_export(weights, major, tmp_path):
    path = FOLDER / f"first_version_{major}x.pt"
    out = export_checkpoint(path, tmp_path / "out", model="tiny-saved", weights=weights)
    key = {"student": "state_dict", "teacher": "state_dict_ema"}[weights]
    expected = upgraded(load(path))[key]
    loaded = open_clip.create_model(f"local-dir:{out}").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in expected.items())
