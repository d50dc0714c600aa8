"""Shared fixtures: tiny models and made-up data, nothing downloaded."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when open_clip is imported

import numpy as np
import open_clip
import pytest
from data_helpers import as_file, write_tar
from PIL import Image, ImageDraw

TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
TOWERS = {
    "rn": ({"layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, TEXT),
    "vit": ({"layers": 2, "patch_size": 8, "width": 16, "head_width": 8}, TEXT | {"layers": 2}),
    "timm": ({"timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear"}, TEXT),
}
TOWERS["timm"][0].update({"timm_model_pretrained": False, "timm_drop": 0.1})
MODELS = {
    f"tiny-{name}": {"embed_dim": 16, "vision_cfg": vision | {"image_size": 32}, "text_cfg": text}
    for name, (vision, text) in TOWERS.items()
}
COLOURS = ("red", "green", "blue", "black", "orange", "purple")
SHAPES = ("circle", "square", "line")
CLASSES = [*COLOURS, *SHAPES]


def picture(rng: random.Random, colour: str, shape: str) -> Image.Image:
    """A 40 px picture of one coloured shape somewhere on white."""
    image = Image.new("RGB", (40, 40), "white")
    draw = ImageDraw.Draw(image)
    x, y = rng.randrange(4, 16), rng.randrange(4, 16)
    box = (x, y, x + 18, y + 18)
    {"circle": draw.ellipse, "square": draw.rectangle, "line": draw.line}[shape](box, fill=colour)
    return image


@pytest.fixture(scope="session", autouse=True)
def model_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny models, registered with open_clip."""
    folder = tmp_path_factory.mktemp("model_configs")
    for name, config in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
    return folder


def pytest_unconfigure() -> None:
    """open_clip_train sets every logger to INFO: torch's would tell at exit what was compiled."""
    logging.disable(logging.INFO)


def npy(values: Any, dtype: Any = np.uint8) -> bytes:
    """A label vector as shards have it."""
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, dtype))
    return buffer.getvalue()


def write_set(
    folder: Path,
    shards: Sequence[dict[str, bytes]],
    names: Sequence[str],
    kind: str = "multilabel",
    templates: Sequence[str] = ("a photo of {c}.",),
) -> Path:
    """A clip_benchmark webdataset of the given shards, each {file name: content}."""
    for number, files in enumerate(shards):
        write_tar(folder / "test" / f"{number}.tar", files)
    (folder / "test" / "nshards.txt").write_text(f"{len(shards)}\n", encoding="utf-8")
    (folder / "classnames.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    file = folder / "zeroshot_classification_templates.txt"
    file.write_text("\n".join(templates), encoding="utf-8")
    (folder / "dataset_type.txt").write_text(kind, encoding="utf-8")
    return folder


def text_folder(
    folder: Path,
    width: int = 16,
    layers: int = 1,
    words: Sequence[str] = CLASSES,
    positions: int = 12,
    pooler: bool = False,
    dropout: float = 0.1,
) -> Path:
    """A BERT with random weights and its tokenizer of whole ``words``, as transformers saves them."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    sizes = {"vocab_size": len(vocabulary), "hidden_size": width, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": 2}
    sizes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(**sizes, max_position_embeddings=positions)
    BertModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a tiny model with a Hugging Face text tower and tokenizer made here."""
    folder = tmp_path_factory.mktemp("hf")
    tower = str(text_folder(folder / "tower"))
    text = {"hf_model_name": tower, "hf_tokenizer_name": tower, "context_length": 8}
    text |= {"hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
    config = json.dumps(MODELS["tiny-timm"] | {"text_cfg": text})
    (folder / "tiny-hf.json").write_text(config, encoding="utf-8")
    open_clip.add_model_config(folder / "tiny-hf.json")
    return "tiny-hf"


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 pairs as webdataset shards (00000.tar, 00001.tar, sizes.json) and as pairs.csv."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = random.Random(0)
    rows, sizes = ["filepath\ttitle"], {}
    for shard in range(2):
        files = {}
        for i in range(36):
            colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
            file = folder / f"{shard}-{i}.png"
            file.write_bytes(as_file(picture(rng, colour, shape)))
            caption = f"a {colour} {shape}"
            rows.append(f"{file}\t{caption}")
            key = f"{shard}{i:04d}"
            files |= {f"{key}.png": file.read_bytes(), f"{key}.txt": caption.encode()}
        sizes[write_tar(folder / f"{shard:05d}.tar", files).name] = 36
    (folder / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pictures with two labels each, as a multi-label clip_benchmark webdataset."""
    rng = random.Random(3)
    files = {}
    for i in range(30):
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        files[f"{i:04d}.png"] = as_file(picture(rng, colour, shape))
        files[f"{i:04d}.npy"] = npy([name in (colour, shape) for name in CLASSES])
    return write_set(tmp_path_factory.mktemp("labelled"), [files], CLASSES, templates=["a {c}"])


@pytest.fixture(scope="session")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tiny towers with random weights, in the place of the demo's two packages'."""
    import timm
    import torch

    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_efficientnet").state_dict(), folder / "image.pt")
    letters = [*string.ascii_lowercase, *string.digits, "-"]
    words = [*letters, *(f"##{letter}" for letter in letters)]
    text = text_folder(folder / "text", words=words, positions=32)
    image = {"image": "test_efficientnet", "image_weights": folder / "image.pt"}
    return {**image, "text": text}


@pytest.fixture(scope="session")
def model(towers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two towers, in a folder."""
    from otter_openclip.model_folders.towers import make_towers

    out = tmp_path_factory.mktemp("model") / "towers"
    return make_towers(out, **towers, image_size=32, context_length=20)
