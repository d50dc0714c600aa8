"""Look at webdataset shards: counts, caption lengths, image sizes, unreadable samples, a contact sheet.

Takes shards of image-caption pairs and clip_benchmark's evaluation sets. Every image is decoded as for
training. The exit code is 1 if something is wrong with the shards, and every fault is named.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from otter_openclip.cli import positive
from otter_openclip.data import inspecting
from otter_openclip.data.contact_sheet import draw
from otter_openclip.data.pool import default_workers, ordered_map
from otter_openclip.evaluation.validator import Folder, is_evaluation
from otter_openclip.files import make_room, write_json

SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add = parser.add_argument
    text = "tars or folders of tars; braces and wildcards are expanded, as for --train-data"
    add("shards", nargs="+", metavar="SHARDS", help=text)
    text = "picture to write, of the format its suffix says; default contact_sheet.png here"
    add("--sheet", default="contact_sheet.png", metavar="FILE", help=text)
    add("--pictures", type=positive, default=48, metavar="N", help="images on it; default 48")
    add("--json", metavar="FILE", help="also write the figures and all faults there")
    workers = default_workers()
    add("--workers", type=positive, default=workers, metavar="N", help="default: one per CPU")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    paths = inspecting.find_shards(args.shards)
    for file in filter(None, (args.sheet, args.json)):
        make_room(Path(file))
    # The evaluation set that a folder of shards is the split of, or None for training pairs.
    sets = {
        folder: Folder(folder.parent, folder.name) if is_evaluation(folder) else None
        for folder in dict.fromkeys(path.parent for path in paths)
    }
    jobs = [(path, sets[path.parent]) for path in paths]
    look = partial(inspecting.Look, pictures=-(-args.pictures // len(jobs)))
    looks = ordered_map(look, jobs, args.workers)
    looks = list(tqdm(looks, "Reading shards", len(paths), unit="shard"))
    faults, remarks = inspecting.judge(looks, sets)
    figures = inspecting.summarise(looks)
    print(inspecting.table(figures))
    for kind, listed in (("remark", remarks), ("fault", faults)):
        print(*(f"{kind}: {text}\n" for text in listed[:SHOWN]), sep="", end="")
    if len(faults) > SHOWN:
        print(f"... {len(faults)} faults in all{'' if args.json else '; --json FILE lists them'}")
    elif not faults:
        print("No faults: every sample can be read.")
    if args.json:
        rows = [dict(zip(("shard", "sample", "fault"), fault, strict=True)) for fault in faults]
        write_json(Path(args.json), {**figures, "faults": rows, "remarks": list(map(str, remarks))})
    pictures = chain.from_iterable(look.pictures for look in looks)
    if chosen := list(islice(pictures, args.pictures)):
        draw(chosen, Path(args.sheet))
        print(f"{len(chosen)} of them, the first of each shard: {args.sheet}")
    else:
        print(f"No image to draw: {args.sheet} is not written.")
    return 1 if faults else 0
