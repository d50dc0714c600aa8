"""Look at webdataset shards: counts, caption lengths, image sizes, unreadable samples, a contact sheet.

Takes shards of image-caption pairs and clip_benchmark's evaluation sets. Every image is decoded as for
training. The exit code is 1 if something is wrong with the shards, and every fault is named.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from otter_openclip.data.inspecting import add_arguments, inspect
from otter_openclip.evaluation.validator import Folder, is_evaluation

__all__ = ["add_arguments", "main"]


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    return inspect(args, _evaluation_set)


def _evaluation_set(folder: Path) -> Folder | None:
    """The evaluation set that a folder of shards is the split of, or None for training pairs."""
    return Folder(folder.parent, folder.name) if is_evaluation(folder) else None
