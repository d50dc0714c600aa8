"""Turn data sets as downloaded into webdataset shards, for evaluation and for training."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from otter_openclip.cli import Command, run_command

COMMANDS = {
    name: Command(f"otter_openclip.{module}", text)
    for name, module, text in (
        ("open-images", "data.open_images", "Google Open Images' test split, for evaluation"),
        ("imagenet10k", "data.imagenet10k", "Tencent ML-Images' ImageNet part, for evaluation"),
        ("cc3m", "data.cc3m", "Conceptual Captions, for training"),
        ("yfcc15m", "data.yfcc15m", "OpenAI's subset of YFCC100M, for training"),
        ("wit", "data.wit", "Wikipedia image text, for training"),
        ("csv", "data.csv_file", "any table of image paths and captions, for training"),
        ("hf", "data.hf", "a Hugging Face dataset, for training"),
        ("inspect", "inspect_command", "figures, faults and a contact sheet of shards"),
    )
}


def main(argv: Sequence[str]) -> int:
    """Run one of the data commands; returns its exit code."""
    try:
        return run_command("otter-openclip data", __doc__, COMMANDS, argv)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
