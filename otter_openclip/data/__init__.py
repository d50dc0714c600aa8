"""Turn data sets as downloaded into webdataset shards, for evaluation and for training."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from otter_openclip.cli import Command, run_command

_HELP = {
    "open-images": "Google Open Images' test split, for zero-shot evaluation",
    "imagenet10k": "Tencent ML-Images' ImageNet part, for zero-shot evaluation",
    "cc3m": "Conceptual Captions, for training",
    "yfcc15m": "OpenAI's subset of YFCC100M, for training",
    "wit": "Wikipedia image text, for training",
    "csv": "any table of image paths and captions, for training",
    "hf": "a Hugging Face dataset, for training",
    "inspect": "counts, lengths, sizes, faults and a contact sheet of shards",
}
_MODULES = {"open-images": "open_images", "csv": "csv_file"}  # others are called as the command
COMMANDS = {
    name: Command(f"{__name__}.{_MODULES.get(name, name)}", text) for name, text in _HELP.items()
}


def main(argv: Sequence[str]) -> int:
    """Run one of the data commands; returns its exit code."""
    try:
        return run_command("otter-openclip data", __doc__, COMMANDS, argv)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
