"""What the builders of training sets share: image-caption pairs to shards with ``sizes.json``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from otter_openclip.data import building, lookup, options, sources
from otter_openclip.data.plan import Plan
from otter_openclip.files import write_json
from otter_openclip.flags import number

SHARD_SIZE = 10_000
EMPTY_CAPTION = "empty caption"


def add_image_options(parser: argparse.ArgumentParser, images: str, *, required: bool) -> None:
    """Add --images and --img2dataset, one of which must be given if ``required``."""
    add = parser.add_mutually_exclusive_group(required=required).add_argument
    add("--images", nargs="+", metavar="PATH", help=images)
    text = "img2dataset's output folder, or its tars or parquet files; any --output_format but tfrecord"
    add("--img2dataset", nargs="+", metavar="PATH", help=text)


def add_pair_output(parser: argparse.ArgumentParser) -> None:
    """Add the options of the shard writer, with those of the samples' order."""
    options.add_output(parser, shard_size=SHARD_SIZE)
    add = parser.add_argument_group("order").add_argument
    text = "shuffles the pairs before they are cut; default 0"
    add("--seed", type=number(0, kind=int), metavar="N", help=text)
    text = "keep the input's order (archives on a slow disk are then read from front to back)"
    add("--no-shuffle", action="store_true", help=text)


class Images:
    """The pictures that --images or --img2dataset stand for."""

    def __init__(self, args: argparse.Namespace, default: Sequence[str] = ()) -> None:
        """Look what is there; FileNotFoundError or ValueError naming what is not."""
        self.downloaded, self.search = bool(args.img2dataset), bool(args.images)
        self.default = not self.downloaded and not self.search
        given = args.images or args.img2dataset or default
        self.folders, self.archives = sources.expand(given)
        if self.downloaded and not self.archives:
            # The parquet form holds nothing else; beside tars or folders parquet is statistics.
            _, tables = sources.expand(given, sources.TABLES)
            if not any(entry.is_dir() for folder in self.folders for entry in os.scandir(folder)):
                self.archives = tables

    def open(
        self, plan: Plan, fields: tuple[str, ...] = ("url",), *, any_suffix: bool = False
    ) -> Callable[..., lookup.Found]:
        """Index them; returns what finds a picture, by URL or by paths."""
        place = plan.index, self.folders, self.archives, plan.folder / "unpacked"
        if self.downloaded:
            return lookup.Downloaded(*place, fields).find
        paths = lookup.Paths(*place, any_suffix=any_suffix, search=self.search, first=self.default)
        return paths.find


def add(plan: Plan, name: str, found: lookup.Found, caption: str, where: str = "") -> None:
    """Append a pair to the plan, or drop it."""
    if found.file is not None and not caption.strip():
        plan.drop(name, EMPTY_CAPTION, where)
    else:
        plan.add(name, found, caption, where=where)


def build(
    args: argparse.Namespace,
    settings: dict[str, Any],
    inputs: Sequence[str],
    fill: Callable[[Plan], None],
    *,
    record: str,
    finish: Callable[[Path, Plan], None] = lambda *_: None,
) -> int:
    """Build a training set; returns the exit code. As `building.Build` and `building.run` have it."""
    if args.no_shuffle and args.seed is not None:
        raise ValueError("--no-shuffle has no use for --seed; drop one")

    def write_rest(folder: Path, plan: Plan) -> None:
        finish(folder, plan)
        sizes = {name: samples for name, samples, _ in plan.report()["written"]}
        write_json(folder / "sizes.json", sizes)

    seed = None if args.no_shuffle else args.seed or 0
    encode = lambda caption: ("txt", caption.encode())  # noqa: E731
    job = building.Build(args, settings, inputs, encode, "{:05d}.tar", record, seed)
    report = building.run(job, fill, write_rest)
    options.print_summary(job.shown, report)
    last = report["shards"] - 1
    print(f"--train-data '{job.shown}/{f'{{00000..{last:05d}}}' if last else '00000'}.tar'")
    return 0
