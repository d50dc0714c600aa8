"""Run the training command inside the test process, on the made-up pairs."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip_train import params

from otter_openclip.replacing import replaced
from otter_openclip.train import main
from otter_openclip.training.launcher import Run
from otter_openclip.training.plugin import Plugin

COMMON = "--model tiny-rn --batch-size 12 --epochs 2 --lr 1e-2 --workers 0 --log-every-n-steps 1"
COMMON += " --name run --warmup 1"


def words_of(*words: Any) -> list[str]:
    """The words of a command line, whose flags may have their values after them: ``--loss otter``."""
    split = (w.split() if (w := str(word)).startswith("--") else [w] for word in words)
    return [word for several in split for word in several]


def parse_args(*argv: Any) -> Any:
    """The command's parsed arguments, as its ``main`` gets them."""
    with replaced(*Run(Plugin()).replacements()):
        return params.parse_args(words_of(*argv) or None)


def flags(pairs: Path, logs: Path, *extra: Any, csv: bool = False) -> list[str]:
    """A full command line; ``extra`` flags override the common ones."""
    data = str(pairs / "pairs.csv") if csv else str(pairs / "{00000..00001}.tar")
    return words_of("--train-data", data, "--logs", logs, COMMON, *extra)


def train(pairs: Path, logs: Path, *extra: Any, csv: bool = False) -> Path:
    """Train and return the checkpoints folder."""
    line = flags(pairs, logs, *extra, csv=csv)
    with replaced((root := logging.getLogger(), "handlers", list(root.handlers))):
        assert main(line) == 0
    return logs / dict(pairwise(line))["--name"] / "checkpoints"


def trained_once(model: str, file: Path) -> dict[str, Any]:
    """Weights of ``model``, in ``file`` too, with statistics other than the initial ones."""
    torch.manual_seed(1)
    made = open_clip.create_model(model)
    made.train()(torch.randn(64, 3, 32, 32))
    torch.save(made.state_dict(), file)
    return made.state_dict()


def stock(out: Path) -> tuple[Any, Any, Any]:
    """Model, transform and tokenizer of a folder, as stock open_clip loads them."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{out}")


def hide_plugin(folder: Path) -> Path:
    """A folder for the path, in which this package cannot be imported."""
    package = folder / "otter_openclip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('blocked')", encoding="utf-8")
    return folder


def load(path: Path) -> dict[str, Any]:
    """A checkpoint, as a user with no trust in it would read it."""
    return torch.load(path, weights_only=True)


def assert_same(one: Any, other: Any, where: str = "checkpoint") -> None:
    """Bit-identical nested containers of tensors and plain values."""
    assert type(one) is type(other), where
    if isinstance(one, dict | list | tuple):
        assert len(one) == len(other), where
        for key in one if isinstance(one, dict) else range(len(one)):
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where
