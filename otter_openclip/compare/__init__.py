"""The course of InfoNCE and OTTER on two frozen pretrained towers, on glyphs or on your own pairs.

Makes the data, unless they are given, trains and evaluates with the real command on cached features, and
writes a table and a picture. It reports what it measured, whoever wins.
"""

from __future__ import annotations

import argparse
import os

from otter_openclip.cli import needs, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add = parser.add_argument
    add("--output", default="demo-output", metavar="DIR", help="default: demo-output")
    add(
        "--seed", type=number(0, kind=int), default=0, help="of data, split and training; default 0"
    )
    add("--all", action="store_true", help="also train LS and KD")
    add("--quick", action="store_true", help="a short run of the whole chain")
    add("--data", metavar="DIR", help="your own pairs: a folder of webdataset shards; with --eval")
    text = "your own test set: a clip_benchmark webdataset, with several labels a picture or one"
    add("--eval", metavar="DIR", help=text)


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code.

    Raises:
        RuntimeError: naming the extra to install, if matplotlib is missing.
    """
    needs("matplotlib", "demo")
    # Torch reads it when it is imported: threads must not spin while another process needs the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from otter_openclip.compare.demo import run  # heavy imports

    settings = {"all_losses": args.all, "quick": args.quick, "data": args.data, "test": args.eval}
    return run(args.output, seed=args.seed, **settings)
