"""Turn a checkpoint of facebookresearch/OTTER into a folder that stock open_clip loads.

The folder is the one that ``export`` writes: ``open_clip.create_model("local-dir:OUT")``,
``open_clip.get_tokenizer("local-dir:OUT")`` and clip_benchmark use it without this package.

What the format cannot say: the reference shrinks a picture's shorter side to 256 before it crops 224,
open_clip's preprocessing shrinks it to 224 (``otter-openclip eval --reference_crop`` does as the
reference); open_clip's tokenizer cleans white space and HTML entities first, the reference does not; and
open_clip fetches the text tower's configuration by name when it loads the folder.
"""

from __future__ import annotations

import argparse

WEIGHTS = ("student", "teacher")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add = parser.add_argument
    text = "last.pth.tar or best.pth.tar of the reference"
    add("checkpoint", metavar="CHECKPOINT", help=text)
    add("out", metavar="OUT", help="folder to write; new or empty")
    add("--weights", choices=WEIGHTS, default="student", help="default: student")
    text = "the text tower's Hugging Face name, or a folder with its config.json and tokenizer; "
    text += "default: the name that belongs to the checkpoint's text_arch"
    add("--text-model", metavar="NAME_OR_DIR", help=text)
    add("--overwrite", action="store_true", help="replace OUT if it is an earlier export")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    from otter_openclip.model_folders.convert import convert_checkpoint  # heavy imports

    out = convert_checkpoint(report=print, **vars(args))
    print(f"Wrote {out}; re-loaded with open_clip, every tensor is the converted one.")
    print(f"  open_clip.create_model_and_transforms('local-dir:{out}')")
    print(
        "Stock preprocessing resizes to 224 where the reference resizes to 256 and crops 224; for its "
        "figures, evaluate with --reference_crop."
    )
    return 0
