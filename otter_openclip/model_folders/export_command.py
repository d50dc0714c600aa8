"""Turn a training checkpoint into a folder that stock open_clip and clip_benchmark load.

``open_clip.create_model("local-dir:OUT")``, ``open_clip.get_tokenizer("local-dir:OUT")`` and
``clip_benchmark eval --model local-dir:OUT`` use the folder as it is, without this package.

Two limits of stock open_clip: it reads the configuration of a text tower from Hugging Face (not its
weights; the tokenizer's files are in the folder) by its ``hf_model_name``, see ``write_folder``; and a
timm tower whose weights depend on the image size cannot be rebuilt at a forced size.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from otter_openclip.cli import number

WEIGHTS = ("student", "teacher")

# open_clip_train's flags that change the model or its preprocessing; read back from params.txt.
MODEL_FLAGS: dict[str, dict[str, Any]] = {
    "--force-image-size": {"type": number(1, kind=int), "nargs": "+"},
    "--force-context-length": {"type": number(1, kind=int)},
    "--force-quick-gelu": {"action": "store_true", "default": None},
    "--force-custom-text": {"action": "store_true", "default": None},
    "--image-mean": {"type": number(-math.inf), "nargs": "+"},
    "--image-std": {"type": number(0, open_low=True), "nargs": "+"},
    "--image-interpolation": {"choices": ["bicubic", "bilinear", "random"]},
    "--image-resize-mode": {"choices": ["shortest", "longest", "squash"]},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add = parser.add_argument
    text = "epoch_N.pt, best.pt, a file of bare weights, or a run's folder (its newest checkpoint)"
    add("checkpoint", metavar="CHECKPOINT", help=text)
    add("out", metavar="OUT", help="folder to write; new or empty")
    text = "model name the run was trained under; default: the one in its params.txt"
    add("--model", metavar="NAME", help=text)
    text = "default: student; of best.pt those that were evaluated, see --zeroshot-weights of train"
    add("--weights", choices=WEIGHTS, help=text)
    add("--overwrite", action="store_true", help="replace OUT if it is an earlier export")
    add = parser.add_argument_group("publishing", "OUT has a model card, README.md").add_argument
    text = "of the weights, for the card: apache-2.0, cc-by-nc-4.0, other, ...; none is assumed"
    add("--license", metavar="ID", help=text)
    text = "result files of otter-openclip eval or clip_benchmark eval of this model, for the card"
    add("--results", action="extend", nargs="+", default=[], metavar="FILE", help=text)
    add("--push-to-hub", metavar="OWNER/NAME", help="then push OUT there; needs --license")
    add("--private", action="store_true", help="a repository made for it is private")
    text = "as in training; by default those in the run's params.txt"
    add = parser.add_argument_group("model flags", text).add_argument
    for flag, keywords in MODEL_FLAGS.items():
        add(flag, **keywords)


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    from otter_openclip.model_folders.export import export_checkpoint  # heavy imports

    out = export_checkpoint(report=print, **vars(args))
    print(f"Wrote {out}; re-loaded with open_clip, every tensor is the checkpoint's.")
    print(f"  open_clip.create_model_and_transforms('local-dir:{out}')")
    return 0
