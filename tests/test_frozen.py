"""``--lock-image --lock-image-freeze-bn-stats``: what is frozen stays what it was, and exports."""

import json

import open_clip
import pytest
import torch
from conftest import MODELS
from timm.layers import BatchNormAct2d
from training_helpers import load, train

from otter_openclip.checkpoints.export import export_checkpoint

FREEZE = ["--lock-image", "--lock-image-freeze-bn-stats"]


@pytest.fixture(scope="module", autouse=True)
def efficientnet(tmp_path_factory):
    """A timm tower whose batch norms hold the activations."""
    folder = tmp_path_factory.mktemp("efficientnet")
    vision = MODELS["tiny-timm"]["vision_cfg"] | {"timm_model_name": "test_efficientnet"}
    config = MODELS["tiny-timm"] | {"vision_cfg": vision | {"timm_drop": 0.0}}
    (folder / "tiny-effnet.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-effnet.json")


@pytest.mark.parametrize("accum", [[], ["--accum-freq", "2", "--batch-size", "6"]])
@pytest.mark.parametrize("model", ["tiny-effnet", "tiny-rn"])
@pytest.mark.parametrize("loss", ["infonce", "otter"])
def test_a_frozen_tower_is_the_pretrained_one(pairs, tmp_path, model, loss, accum):
    torch.manual_seed(1)
    start = open_clip.create_model(model)
    start.train()(torch.randn(64, 3, 32, 32))  # statistics other than the initial ones
    torch.save(start.state_dict(), tmp_path / "start.pt")
    extra = ["--loss", loss, "--model", model, "--pretrained", str(tmp_path / "start.pt")]
    path = train(pairs, tmp_path, *extra, *FREEZE, *accum, "--epochs", "1")
    state = load(path / "epoch_1.pt")["state_dict"]
    before = start.state_dict()
    assert state.keys() == before.keys()
    prefix = "visual.trunk." if model == "tiny-effnet" else "visual."
    trunk = [key for key in state if key.startswith(prefix)]
    assert any("num_batches_tracked" in key for key in trunk)
    assert all(torch.equal(state[key], before[key]) for key in trunk)
    changed = [key for key in state if not torch.equal(state[key], before[key])]
    assert changed

    out = export_checkpoint(tmp_path / "run", tmp_path / "out")
    exported = open_clip.create_model(f"local-dir:{out}").eval()
    images = torch.randn(2, 3, 32, 32)
    towers = (start.eval().visual, exported.visual)
    with torch.no_grad():
        one, other = (getattr(tower, "trunk", tower)(images) for tower in towers)
    assert torch.equal(one, other)


def test_training_runs_the_frozen_tower_in_eval_mode(pairs, tmp_path, monkeypatch):
    """Student and teacher, also after open_clip's loop has called ``train()``."""
    seen = []
    stock = BatchNormAct2d.forward

    def record(self, x):
        seen.append(self.training)
        return stock(self, x)

    monkeypatch.setattr(BatchNormAct2d, "forward", record)
    extra = ["--loss", "otter", "--model", "tiny-effnet", "--epochs", "1"]
    train(pairs, tmp_path / "frozen", *extra, *FREEZE)
    calls = len(seen)
    assert calls and not any(seen)
    seen.clear()
    train(pairs, tmp_path / "not", *extra, "--lock-image")
    assert len(seen) == calls and all(seen)
