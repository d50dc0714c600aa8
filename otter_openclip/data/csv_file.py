"""Any table of image paths and captions as training shards.

The columns are named as for open_clip's --dataset-type csv, and its defaults are the defaults here.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tqdm import tqdm

from otter_openclip.data import pairs, sources
from otter_openclip.data.options import existing_file
from otter_openclip.data.shards import MISSING, Planner
from otter_openclip.data.tables import csv_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument(
        "--captions", required=True, metavar="FILE", help="the table, with a header"
    )
    parser.add_argument("--csv-separator", default="\t", metavar="C", help="default: a tab")
    parser.add_argument(
        "--csv-img-key", default="filepath", metavar="NAME", help="column; default filepath"
    )
    parser.add_argument(
        "--csv-caption-key", default="title", metavar="NAME", help="column; default title"
    )
    pairs.add_image_options(
        parser,
        "folders or archives that hold the paths (archives: the file names); by default paths start "
        "from the current folder, as open_clip has it, or from the table's",
        required=False,
    )
    pairs.add_pair_output(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    table = existing_file(args.captions, "--captions")
    separator = args.csv_separator.replace("\\t", "\t")
    if len(separator) != 1:
        raise ValueError(f"--csv-separator must be one character, got {args.csv_separator!r}")
    given = args.images or args.img2dataset
    folders, archives = sources.expand(given or [])
    if given is None:
        folders = [Path.cwd(), table.parent]
    rows = csv_rows(table, separator)
    _, header = next(rows, (0, []))
    for key in (args.csv_img_key, args.csv_caption_key):
        if key not in header:
            raise ValueError(
                f"{table} has no column {key!r} but {', '.join(map(repr, header))}; see --csv-img-key, "
                "--csv-caption-key and --csv-separator"
            )
    image_column, caption_column = map(header.index, (args.csv_img_key, args.csv_caption_key))

    def plan(planner: Planner) -> None:
        unpacked = sources.unpacked(archives, planner.folder / "unpacked")
        planner.archives += map(str, unpacked)
        if args.img2dataset:
            downloaded = sources.Downloaded(folders, unpacked, ("url",), args.workers)
        else:
            index = sources.index_archives(unpacked, sources.by_file_name, args.workers)
            places = sources.Folders(folders, 1)
        for number, row in tqdm(rows, "Reading captions", unit="caption"):
            if len(row) != len(header):
                raise ValueError(
                    f"{table}:{number}: {len(row)} fields, the header has {len(header)}"
                )
            image, caption = row[image_column], row[caption_column]
            if args.img2dataset:
                locator = downloaded.find(image)
            else:
                locator = index.find(os.path.basename(image)) or places.find([image])
            if locator is None:
                planner.drop(image, MISSING, f"line {number}")
            elif not caption.strip():
                planner.drop(image, pairs.EMPTY_CAPTION, f"line {number}")
            else:
                planner.add(image, locator, caption, identity=f"{locator}\n{caption}")

    settings = {
        "captions": str(table),
        "csv-separator": separator,
        "csv-img-key": args.csv_img_key,
        "csv-caption-key": args.csv_caption_key,
    }
    return pairs.build(args, settings, [table, *archives], plan)
