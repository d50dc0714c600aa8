"""A fixed teacher that would misread the student's images or tokens is refused before work begins."""

import json

import open_clip
import pytest
import torch
from conftest import MODELS
from training_helpers import train


@pytest.fixture
def saved(tmp_path):
    """Save a model with open_clip's own initial weights; its name and file."""

    def save(name, **changes):
        if changes:
            config = MODELS["tiny-rn"] | changes
            (tmp_path / f"{name}.json").write_text(json.dumps(config))
            open_clip.add_model_config(tmp_path / f"{name}.json")
        file = tmp_path / f"{name}.pt"
        torch.save(open_clip.create_model(name).state_dict(), file)
        return ["--distill-model", name, "--distill-pretrained", str(file)]

    return save


def refused(pairs, logs, *flags):
    with pytest.raises(SystemExit) as error:
        train(pairs, logs, "--loss", "kd", "--epochs", "1", *flags)
    assert not list(logs.rglob("*.pt"))
    return str(error.value.code)


def test_image_size(pairs, tmp_path, saved):
    larger = MODELS["tiny-rn"]["vision_cfg"] | {"image_size": 64}
    message = refused(pairs, tmp_path / "l", *saved("teacher-64px", vision_cfg=larger))
    assert "--distill-model teacher-64px" in message
    assert "its image size is (64, 64), the student's (32, 32); pass --force-image-size" in message


@pytest.mark.parametrize("what", ["mean", "std"])
def test_mean_and_std(pairs, tmp_path, saved, what):
    changed = ["0.5", "0.4", "0.3"]
    message = refused(pairs, tmp_path / "l", *saved("tiny-vit"), f"--image-{what}", *changed)
    default = getattr(open_clip, f"OPENAI_DATASET_{what.upper()}")
    assert f"its image {what} is {default}, the student's (0.5, 0.4, 0.3)" in message


def test_context_length(pairs, tmp_path, saved):
    longer = MODELS["tiny-rn"]["text_cfg"] | {"context_length": 20}
    message = refused(pairs, tmp_path / "l", *saved("teacher-20-tokens", text_cfg=longer))
    assert "its context length is 20, the student's 8; pass --force-context-length" in message


def test_tokenizer(pairs, tmp_path, saved, hf_model):
    message = refused(pairs, tmp_path / "l", *saved(hf_model))
    assert (
        "its tokenizer is " in message and "the student's SimpleTokenizer of 49408 words" in message
    )
    assert "choose a teacher with the student's tokenizer" in message
