"""The ``otter-openclip`` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from otter_openclip.flags import Command, run_command

COMMANDS = {
    "train": Command(
        "otter_openclip.train", "open_clip's training command with --loss otter", own_parser=True
    ),
    "eval": Command(
        "otter_openclip.evaluation.eval",
        "clip_benchmark's eval with F@K, for any number of classes",
        own_parser=True,
    ),
    "export": Command(
        "otter_openclip.checkpoints.export_command",
        "turn a training checkpoint into a folder for open_clip.create_model",
    ),
    "convert": Command(
        "otter_openclip.checkpoints.convert_command",
        "turn a checkpoint of facebookresearch/OTTER into such a folder",
    ),
    "towers": Command(
        "otter_openclip.towers_command",
        "put two pretrained towers, timm's and Hugging Face's, together into such a folder",
    ),
    "data": Command(
        "otter_openclip.data",
        "turn data sets as downloaded into webdataset shards",
        own_parser=True,
    ),
    "analyze": Command(
        "otter_openclip.analysis",
        "look at training pairs with a model: are the captions noisy, would OTTER help?",
    ),
    "patch": Command(
        "otter_openclip.patching",
        "patch open_clip or clip_benchmark to know --loss otter, and back",
    ),
    "demo": Command(
        "otter_openclip.demo", "the course of InfoNCE and OTTER on two pretrained towers"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. User errors are printed and give 2."""
    argv = sys.argv[1:] if argv is None else argv
    return run_command("otter-openclip", "OTTER as a plugin of open_clip.", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
