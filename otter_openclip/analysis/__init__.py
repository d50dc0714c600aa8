"""Look at pairs with a model: are these captions noisy, would OTTER help?

Reads some pairs of the training data, encodes them, and writes report.html (one file to open in a
browser), matchings.png and stats.json: how the model matches pictures and captions within batches, what
OTTER, knowledge distillation and InfoNCE would make their targets, and pairs worth a look.
"""

from __future__ import annotations

import argparse

from otter_openclip.cli import needs, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add = parser.add_argument
    text = "webdataset shards or a csv file, as for training: braces are expanded"
    add("--train-data", required=True, metavar="DATA", help=text)
    add(
        "--dataset-type",
        choices=("auto", "webdataset", "csv"),
        default="auto",
        help="default: auto",
    )
    add("--csv-separator", default="\t", metavar="TEXT", help="default: a tab")
    add("--csv-img-key", default="filepath", metavar="NAME", help="default: filepath")
    add("--csv-caption-key", default="title", metavar="NAME", help="default: title")
    text = (
        "an open_clip model, local-dir:FOLDER, hf-hub:NAME, or a folder that export or towers wrote"
    )
    add("--model", required=True, metavar="NAME", help=text)
    add(
        "--pretrained",
        metavar="TAG",
        help="the named model's weights: a tag or a checkpoint's file",
    )
    text = "take what a training run with the same frozen towers kept there; the rest is encoded"
    add("--feature-cache", metavar="DIR", help=text)
    text = "pairs to look at; default 4096, which takes minutes on a CPU"
    add("--samples", type=positive, default=4096, metavar="N", help=text)
    text = "within which pictures and captions are matched; default 512 1024 2048"
    sizes = [512, 1024, 2048]
    add("--batch-sizes", type=positive, nargs="+", default=sizes, metavar="B", help=text)
    add("--output", default="analysis", metavar="DIR", help="default: analysis")
    add("--device", metavar="NAME", help="default: cuda if there is one, else cpu")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code.

    Raises:
        RuntimeError: naming the extra to install, if matplotlib is missing.
    """
    needs("matplotlib", "plots")
    from otter_openclip.analysis.analyzing import run  # heavy imports

    return run(args)
