"""Look at pairs with a model: are these captions noisy, would OTTER help?

Reads some pairs of the training data, encodes them, and writes report.html (one file to open in a
browser) and stats.json: how the model matches pictures and captions within batches, what OTTER,
knowledge distillation and InfoNCE would make their targets, and pairs worth a look.
"""

from __future__ import annotations

import argparse

from otter_openclip.cli import number, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add = parser.add_argument
    text = "webdataset shards as for training: braces are expanded"
    add("--train-data", required=True, metavar="SHARDS", help=text)
    text = "an open_clip model, local-dir:FOLDER, hf-hub:NAME, or a folder of export or towers"
    add("--model", required=True, metavar="NAME", help=text)
    text = "the named model's weights: a tag or a checkpoint's file"
    add("--pretrained", metavar="TAG", help=text)
    text = "pairs to look at; default 4096, which takes minutes on a CPU"
    add("--samples", type=positive, default=4096, metavar="N", help=text)
    text = "within which pictures and captions are matched; default 512 1024 2048"
    sizes = [512, 1024, 2048]
    add("--batch-sizes", type=number(2, kind=int), nargs="+", default=sizes, metavar="B", help=text)
    text = "of training runs with these towers frozen: features in it are not computed again"
    add("--feature-cache", metavar="DIR", help=text)
    add("--output", default="analysis", metavar="DIR", help="default: analysis")
    add("--device", metavar="NAME", help="default: cuda if there is one, else cpu")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    from otter_openclip.analysis.pair_report import run  # heavy imports

    return run(args)
