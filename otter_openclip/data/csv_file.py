"""Any table of image paths and captions as training shards.

The columns are named as for open_clip's --dataset-type csv, and its defaults are the defaults here.
Without --images a path counts as it is written, from the current folder or else from the table's.
"""

from __future__ import annotations

import argparse
import os

from tqdm import tqdm

from otter_openclip.data import pairs, tables
from otter_openclip.data.lookup import Paths
from otter_openclip.data.plan import Plan
from otter_openclip.data.sources import absolute


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add = parser.add_argument
    text = "the table, with a header"
    add("--captions", required=True, type=absolute, metavar="FILE", help=text)
    add("--csv-separator", metavar="C", help="default: tab, comma or semicolon, as the header has")
    add("--csv-img-key", default="filepath", metavar="NAME", help="column; default filepath")
    add("--csv-caption-key", default="title", metavar="NAME", help="column; default title")
    text = "folders or archives that hold the paths; default: the current folder or the table's"
    pairs.add_image_options(parser, text, required=False)
    pairs.add_pair_output(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    separator = args.csv_separator and args.csv_separator.replace("\\t", "\t")
    if separator is not None and len(separator) != 1:
        raise ValueError(f"--csv-separator must be one character, got {args.csv_separator!r}")
    columns = args.csv_img_key, args.csv_caption_key
    separator = separator or tables.separator_of(args.captions)
    rows = tables.table(args.captions, columns, separator)
    plain = not (args.images or args.img2dataset)
    beside = os.getcwd(), os.path.dirname(args.captions)
    images = Paths(()) if plain else pairs.images(args)

    def fill(plan: Plan) -> None:
        for line, (image, caption) in tqdm(rows, "Reading captions", unit="caption"):
            suffix = os.path.splitext(image)[1]
            if "\n" in caption and separator in caption and suffix and suffix in caption:
                fault = "a quotation mark joins several rows into one; double it"
                raise tables.at(args.captions, line, fault)
            path = os.fsdecode(image.encode())  # of a disk's UTF-8 names, whatever the locale
            paths = [os.path.join(folder, path) for folder in beside] if plain else [path]
            plan.add(image, images.find(*paths), caption, where=f"line {line}")

    return pairs.build(args, [args.captions], images, fill, "row")
