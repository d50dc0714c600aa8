"""Train InfoNCE and OTTER on the glyphs of matplotlib's fonts: a check of the whole chain.

Makes the data, trains with the real command, exports, evaluates with stock clip_benchmark, and writes
a table and a picture. It reports what it measured, whoever wins.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument(
        "--output", default="demo-output", metavar="DIR", help="default: demo-output"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of data, split and training; default 0"
    )
    parser.add_argument("--all", action="store_true", help="also train LS and KD")
    parser.add_argument("--quick", action="store_true", help="a minute's run of the whole chain")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    from otter_openclip.demo.pipeline import run  # heavy imports

    return run(args.output, seed=args.seed, all_losses=args.all, quick=args.quick)
