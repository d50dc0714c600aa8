"""Turn data sets as downloaded into webdataset shards, for evaluation and for training."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands to ``parser``."""
    from otter_openclip.data import cc3m, csv_file, imagenet10k, inspect, open_images, wit, yfcc15m

    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    for name, module, summary in (
        ("open-images", open_images, "Google Open Images' test split, for zero-shot evaluation"),
        ("imagenet10k", imagenet10k, "Tencent ML-Images' ImageNet part, for zero-shot evaluation"),
        ("cc3m", cc3m, "Conceptual Captions, for training"),
        ("yfcc15m", yfcc15m, "OpenAI's subset of YFCC100M, for training"),
        ("wit", wit, "Wikipedia image text, for training"),
        ("csv", csv_file, "any table of image paths and captions, for training"),
        ("inspect", inspect, "counts, lengths, sizes, faults and a contact sheet of shards"),
    ):
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run_data=module.main)


def main(args: argparse.Namespace) -> int:
    """Run the subcommand; returns its exit code."""
    args.command = f"data {args.data_command}"  # for error messages
    try:
        return args.run_data(args)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
