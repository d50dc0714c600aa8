"""Small models and data for every command but the builders, their command lines, and what they wrote."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast

from otter_openclip import cli
from otter_openclip.checkpoints.contents import read_file
from otter_openclip.frozen.store import DIGEST, _load

MODEL = "killed"
SHARDS = 2
EPOCHS = 3
_COLOURS = ("red", "green", "blue", "white", "black", "orange")
_SHAPES = ("circle", "square", "line")
_WORDS = [*_COLOURS, *_SHAPES]
_WIDTH = 32
RESNET = {
    "timm_model_name": "test_resnet",
    "timm_model_pretrained": False,
    "timm_pool": "",
    "timm_proj": "linear",
    "image_size": 32,
}
VIT = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}  # the fastest


class Inputs:
    """Inputs in a folder, and the command lines that use them."""

    def __init__(self, folder: Path, vision: Mapping[str, Any] = RESNET) -> None:
        """``folder`` is as ``make`` has filled it, or new; ``vision`` is the model's vision_cfg."""
        self.folder, self.vision = folder, vision
        if (folder / "models").is_dir():
            open_clip.add_model_config(folder / "models")

    def make(self, pairs: int = 96, *, trained: bool) -> None:
        """Fill it; ``trained`` with a finished run, its export and a checkpoint to convert."""
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._make_model()
        rng = np.random.default_rng(0)
        per_shard = pairs // SHARDS
        for shard in range(SHARDS):
            files = {}
            for n in range(per_shard):
                files[f"{shard}{n:05d}.png"] = _picture(rng)
                files[f"{shard}{n:05d}.txt"] = " ".join(rng.choice(_WORDS, 3)).encode()
            _write_tar(folder / f"{shard:05d}.tar", files)
        sizes = {f"{shard:05d}.tar": per_shard for shard in range(SHARDS)}
        (folder / "sizes.json").write_text(json.dumps(sizes))
        self._make_labelled(rng)
        if trained:
            assert cli.main(self.train(folder / "trained", "--workers", "0")) == 0
            assert cli.main(self.export(folder)) == 0
            self._make_reference()

    def _make_model(self) -> None:
        tower = self.folder / "tower"
        config = BertConfig(
            vocab_size=5 + len(_WORDS),
            hidden_size=_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=_WIDTH,
            max_position_embeddings=12,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        torch.manual_seed(0)
        BertModel(config, add_pooling_layer=False).save_pretrained(tower)
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        (self.folder / "vocab.txt").write_text("\n".join([*special, *_WORDS]))
        BertTokenizerFast(str(self.folder / "vocab.txt")).save_pretrained(tower)
        text = {"hf_model_name": str(tower), "hf_tokenizer_name": str(tower)}
        text |= {"hf_proj_type": "linear", "hf_pooler_type": "mean_pooler", "context_length": 8}
        text |= {"hf_model_pretrained": False}
        models = self.folder / "models"
        models.mkdir()
        config = {"embed_dim": 16, "vision_cfg": dict(self.vision), "text_cfg": text}
        (models / f"{MODEL}.json").write_text(json.dumps(config))
        open_clip.add_model_config(models)

    def _make_labelled(self, rng: np.random.Generator) -> None:
        folder = self.folder / "labelled"
        files = {}
        for n in range(16):
            labels = io.BytesIO()
            np.save(labels, (rng.permutation(len(_WORDS)) < 2).astype(np.uint8))
            files |= {f"{n:04d}.png": _picture(rng), f"{n:04d}.npy": labels.getvalue()}
        (folder / "test").mkdir(parents=True)
        _write_tar(folder / "test" / "0.tar", files)
        (folder / "test" / "nshards.txt").write_text("1")
        (folder / "classnames.txt").write_text("\n".join(_WORDS))
        (folder / "zeroshot_classification_templates.txt").write_text("a {c}")
        (folder / "dataset_type.txt").write_text("multilabel")

    def _make_reference(self) -> None:
        image = timm.create_model("test_resnet", num_classes=_WIDTH)
        text = BertModel.from_pretrained(self.folder / "tower", add_pooling_layer=False)
        state = {f"image_encoder.model.{k}": v for k, v in image.state_dict().items()}
        state |= {f"text_encoder.model.{k}": v for k, v in text.state_dict().items()}
        state["contrastive_loss.loss.T"] = torch.tensor(4.0)
        args = {"image_arch": "test_resnet", "text_arch": "declutr-sci-base"}
        args |= {"max_token_length": 8, "embedding_dim": _WIDTH}
        torch.save({"epoch": 1, "state_dict": state, "args": args}, self.folder / "last.pth.tar")

    def train(self, out: Path, *words: str) -> list[str]:
        """Training with the EMA teacher and an evaluation after every epoch."""
        shards = f"{self.folder}/{{00000..{SHARDS - 1:05d}}}.tar"
        line = ["train", "--train-data", shards, "--model", MODEL, "--loss", "otter"]
        line += ["--batch-size", "12", "--epochs", str(EPOCHS), "--warmup", "1", "--lr", "1e-2"]
        line += ["--log-every-n-steps", "1", "--logs", str(out / "logs"), "--name", "run"]
        line += ["--zeroshot-data", str(self.folder / "labelled"), "--zeroshot-frequency", "1"]
        return [*line, *words]

    def train_cached(self, out: Path) -> list[str]:
        """Training of two heads on features kept in the output folder."""
        cache = ["--feature-cache", str(out / "cache"), "--feature-precision", "fp32"]
        lock = ["--lock-image", "--lock-text", "--lock-text-freeze-layer-norm"]
        return self.train(out, "--workers", "1", *lock, *cache)

    def export(self, out: Path) -> list[str]:
        """Export of the finished run."""
        return [
            "export",
            str(self.folder / "trained" / "logs" / "run"),
            str(out / "exported"),
            "--overwrite",
        ]

    def convert(self, out: Path) -> list[str]:
        """Conversion of a checkpoint in the reference's format."""
        line = ["convert", str(self.folder / "last.pth.tar"), str(out / "exported")]
        return [*line, "--overwrite", "--text-model", str(self.folder / "tower")]

    def evaluate(self, out: Path) -> list[str]:
        """Evaluation of the export."""
        model = f"local-dir:{self.folder / 'exported'}"
        line = ["eval", "--model", model, "--pretrained", "", "--dataset", "wds/made"]
        line += ["--dataset_root", str(self.folder / "labelled"), "--num_workers", "1"]
        line += ["--task", "zeroshot_classification", "--batch_size", "7", "--no_amp"]
        return [*line, "--output", str(out / "results.json"), "--class_cache", str(out / "classes")]


def checkpoints(out: Path, last: bool = False) -> dict[str, Any]:
    """The tensors and values of all checkpoints of a run, or of the last epoch's; and the best."""
    found = {}
    for path in (out / "logs" / "run" / "checkpoints").glob("*.pt"):
        contents = read_file(path, mapped=False)
        if path.name != "tmp.pt" and (not last or contents["epoch"] == EPOCHS):
            found[path.name] = contents
    # A killed run's best may be that of an epoch that it did not come to the end of.
    if f"epoch_{EPOCHS}.pt" not in found:
        found.pop("best.pt", None)
    return found


def last_checkpoint(out: Path) -> dict[str, Any]:
    """Of a run that keeps one checkpoint."""
    return checkpoints(out, last=True)


def last_and_features(out: Path) -> dict[str, Any]:
    """The last checkpoint, and the features of each picture and caption."""
    found = checkpoints(out, last=True)
    for path in (out / "cache").glob("*/*.safetensors"):
        keys, features = _load(path)
        for key, row in zip(keys.astype(DIGEST).tolist(), features, strict=True):
            found[f"{path.parent.name}/{key.hex()}"] = row.clone()  # not a view of the file
    return found


def exported(out: Path) -> Mapping[str, Any]:
    """The files of an exported folder, the folder's own name left out of them."""
    names = (path for path in (out / "exported").rglob("*") if path.is_file())
    return {path.name: path.read_bytes().replace(bytes(out), b"OUT") for path in names}


def results(out: Path) -> dict[str, Any]:
    """What an evaluation found."""
    path = out / "results.json"
    return {path.name: json.loads(path.read_text())["metrics"]} if path.exists() else {}


def _picture(rng: np.random.Generator) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize((40, 40), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def _write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
