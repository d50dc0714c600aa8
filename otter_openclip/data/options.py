"""Command-line options that the builders share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from otter_openclip.cli import positive
from otter_openclip.data.pool import default_workers
from otter_openclip.data.sources import absolute


def max_missing(text: str) -> Callable[[int], int]:
    """From "25" or "0.5%" to the number of images that may be missing, of so many."""
    match = re.fullmatch(r"(?P<count>\d+)|(?P<percent>\d+\.?\d*|\.\d+)%", text)
    if match is None or float(match["percent"] or 0) > 100:
        fault = f"{text!r} is neither a count nor a percentage like 0.5%"
        raise argparse.ArgumentTypeError(fault)
    if match["count"]:
        return lambda total: int(text)
    return lambda total: int(total * (float(match["percent"]) / 100))


def add_output(parser: argparse.ArgumentParser, *, shard_size: int) -> None:
    """Add the options of the shard writer."""
    group = parser.add_argument_group("output")
    add, one = group.add_argument, group.add_mutually_exclusive_group().add_argument
    text = "folder or address to write; the same command goes on with a build that was stopped"
    add("--output", required=True, type=absolute, metavar="DIR", help=text)
    text = "scale images down to this shorter side (JPEG quality 95); default: files as they are"
    add("--resize", type=positive, metavar="PIXELS", help=text)
    text = f"samples per shard; default {shard_size}"
    one("--shard-size", type=positive, default=shard_size, metavar="N", help=text)
    text = "number of shards instead; open_clip needs one for each data-loading worker of all GPUs"
    one("--shards", type=positive, metavar="N", help=text)
    text = "processes; default: one per CPU. The result does not depend on it"
    add("--workers", type=positive, default=default_workers(), metavar="N", help=text)
