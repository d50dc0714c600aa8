"""Command-line options and closing lines that the builders share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from otter_openclip.data import sources
from otter_openclip.data.plan import DROPPED_FILE
from otter_openclip.data.pool import default_workers
from otter_openclip.flags import number


def max_missing(text: str) -> Callable[[int], int]:
    """From "25" or "0.5%" to the number of images that may be missing, of so many."""
    share = float(text[:-1]) / 100 if text.endswith("%") and _is_number(text[:-1]) else None
    if not text.isdecimal() and not (share is not None and 0 <= share <= 1):
        fault = f"{text!r} is neither a count nor a percentage like 0.5%"
        raise argparse.ArgumentTypeError(fault)
    return lambda total: int(text) if share is None else int(total * share)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()


positive = number(1, kind=int)


def add_output(parser: argparse.ArgumentParser, *, shard_size: int) -> None:
    """Add the options of the shard writer."""
    group = parser.add_argument_group("output")
    add, one = group.add_argument, group.add_mutually_exclusive_group().add_argument
    text = "folder or address to write; the same command goes on with a build that was stopped"
    add("--output", required=True, metavar="DIR", help=text)
    text = "scale images down to this shorter side (JPEG quality 95); default: files as they are"
    add("--resize", type=positive, metavar="PIXELS", help=text)
    text = f"samples per shard; default {shard_size}"
    one("--shard-size", type=positive, default=shard_size, metavar="N", help=text)
    text = "number of shards instead; open_clip needs one for each data-loading worker of all GPUs"
    one("--shards", type=positive, metavar="N", help=text)
    text = "processes; default: one per CPU. The result does not depend on it"
    add("--workers", type=positive, default=default_workers(), metavar="N", help=text)


def existing_file(path: str, flag: str) -> str:
    """``path``, absolute or an address; FileNotFoundError naming ``flag`` if it is not there."""
    if "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(f"{flag} {path}: no such file")
    return sources.absolute(path)


def print_summary(output: str, report: dict[str, Any]) -> None:
    """Say what was written, and what was not."""
    shards = f"{report['shards']} shard{'s' if report['shards'] > 1 else ''}"
    print(f"{output}: {report['samples']} samples in {shards}.")
    for name, what in (("dropped", "Dropped"), ("skipped", "Left out")):
        if counts := report[name]:
            listed = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
            print(f"{what}: {listed}.")
    if report["dropped"]:
        print(f"Which were dropped, and why: {output}/{DROPPED_FILE}")
