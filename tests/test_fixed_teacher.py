"""A fixed teacher that would misread the student's images or tokens is refused before work begins."""

import json

import open_clip
import pytest
import torch
from conftest import MODELS
from training_helpers import train

LARGER, LONGER = {"vision_cfg": {"image_size": 64}}, {"text_cfg": {"context_length": 20}}


@pytest.mark.parametrize(
    ("teacher", "flags", "message"),
    [
        (LARGER, "", "image size is (64, 64), the student's (32, 32); pass --force-image-size"),
        ({}, "--image-mean 0.5 0.4 0.3", "image mean is (0.481"),
        ({}, "--image-std 0.5 0.4 0.3", "image std is (0.268"),
        (LONGER, "", "context length is 20, the student's 8; pass --force-context-length"),
        (None, "", "49408 words; choose a teacher with the student's tokenizer"),
    ],
)
def test_a_teacher_that_would_misread(pairs, tmp_path, hf_model, teacher, flags, message):
    """``teacher`` is what of tiny-rn's configuration it changes; None is one with other tokens."""
    name = hf_model
    if teacher is not None:
        name, config = "teacher", MODELS["tiny-rn"]
        config = config | {part: config[part] | changes for part, changes in teacher.items()}
        (tmp_path / "teacher.json").write_text(json.dumps(config), encoding="utf-8")
        open_clip.add_model_config(tmp_path / "teacher.json")
    file = tmp_path / "teacher.pt"
    torch.save(open_clip.create_model(name).state_dict(), file)
    words = f"--loss kd --epochs 1 --distill-model {name} --distill-pretrained {file} {flags}"
    with pytest.raises(SystemExit) as error:
        train(pairs, tmp_path / "logs", words)
    assert f"--distill-model {name}" in error.value.code and message in error.value.code
    assert not list((tmp_path / "logs").rglob("*.pt"))
