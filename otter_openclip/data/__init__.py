"""Turn data sets as downloaded into webdataset shards, for evaluation and for training."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from otter_openclip.flags import Command, run_command

COMMANDS = {
    "open-images": Command(
        "otter_openclip.data.open_images",
        "Google Open Images' test split, for zero-shot evaluation",
    ),
    "imagenet10k": Command(
        "otter_openclip.data.imagenet10k",
        "Tencent ML-Images' ImageNet part, for zero-shot evaluation",
    ),
    "cc3m": Command("otter_openclip.data.cc3m", "Conceptual Captions, for training"),
    "yfcc15m": Command("otter_openclip.data.yfcc15m", "OpenAI's subset of YFCC100M, for training"),
    "wit": Command("otter_openclip.data.wit", "Wikipedia image text, for training"),
    "csv": Command(
        "otter_openclip.data.csv_file", "any table of image paths and captions, for training"
    ),
    "hf": Command("otter_openclip.data.hf", "a Hugging Face dataset, for training"),
    "inspect": Command(
        "otter_openclip.data.inspect",
        "counts, lengths, sizes, faults and a contact sheet of shards",
    ),
}


def main(argv: Sequence[str]) -> int:
    """Run one of the data commands; returns its exit code."""
    try:
        return run_command("otter-openclip data", __doc__, COMMANDS, argv)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
