"""Put two pretrained towers, timm's for images and Hugging Face's for texts, together into one model.

The folder is the one that ``export`` writes: stock ``open_clip.create_model("local-dir:OUT")``,
open_clip's training with ``--model local-dir:OUT`` and clip_benchmark use it without this package. Each
tower gets a head to the common embedding. A linear head between equal widths starts as the identity;
others start as open_clip draws them.

What stock open_clip cannot say: timm's ``crop_pct`` (it resizes to the image size and crops nothing),
another image size of a ViT of timm, and a place for the text tower's ``config.json`` inside the folder.
"""

from __future__ import annotations

import argparse
import math

from otter_openclip.cli import number, positive

HEADS = ("linear", "mlp")
POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler", "own": "cls_pooler"}
INTERPOLATIONS = ("bicubic", "bilinear", "random")
CONTEXT_LENGTH = 77  # open_clip's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to write; new or empty")
    text = "timm's name, with or without a weights' tag"
    add("--image", required=True, metavar="NAME", help=text)
    text = "state_dict in .pt, .pth or .safetensors; default: timm's own from the hub"
    add("--image-weights", metavar="FILE", help=text)
    add("--text", required=True, metavar="NAME_OR_DIR", help="Hugging Face name, or such a folder")
    add("--text-weights", metavar="FILE", help="by default those of NAME_OR_DIR")
    add("--text-pooler", choices=POOLERS, help="default: the tower's own, or mean")
    add("--embed-dim", type=positive, metavar="D", help="default: the text tower's width")
    for tower in ("image", "text"):
        add(f"--{tower}-head", choices=HEADS, default="linear", help="default: linear")
    source = "default: the pretrained tower's"
    add("--image-size", type=positive, metavar="PIXELS", help=source)
    add("--image-mean", type=number(-math.inf), nargs=3, metavar=("R", "G", "B"), help=source)
    add("--image-std", type=number(0, open_low=True), nargs=3, metavar=("R", "G", "B"), help=source)
    add("--image-interpolation", choices=INTERPOLATIONS, help=source)
    text = f"default: {CONTEXT_LENGTH}, or as many as the text tower takes"
    add("--context-length", type=positive, metavar="TOKENS", help=text)
    scale = number(0, math.log(100))
    add("--init-logit-scale", type=scale, default=3.9, help="log of the scale; default: 3.9")
    add("--seed", type=number(0, kind=int), default=0, help="of heads that are drawn; default: 0")
    add("--overwrite", action="store_true", help="replace OUT if it is an earlier export")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    from otter_openclip.model_folders.towers import make_towers  # heavy imports

    out = make_towers(report=print, **vars(args))
    print(f"Wrote {out}; re-loaded with open_clip, every tensor is the towers'.")
    print(f"  otter-openclip train --model local-dir:{out} --lock-image --lock-text ...")
    return 0
