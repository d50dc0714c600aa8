"""What the method is for, in three minutes: InfoNCE, OTTER and the closed form on icons.

3,000 icons are paired with the words of their names, once as they are and once with 40% of the captions
shuffled; icons held out are named. Whoever is ahead is shown.
"""

from __future__ import annotations

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    text = "default: demo-output"
    parser.add_argument("--output", default="demo-output", metavar="DIR", help=text)
    parser.add_argument("--quick", action="store_true", help="the whole chain on few icons")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    # Torch reads it when it is imported: threads must not spin while another process needs the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from otter_openclip.compare.demo import demonstrate  # heavy imports

    demonstrate(args.output, quick=args.quick)
    return 0
