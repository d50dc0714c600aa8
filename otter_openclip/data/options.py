"""Command-line options and closing lines that the builders share."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from otter_openclip.data.pool import default_workers
from otter_openclip.data.shards import DROPPED_FILE, Result


@dataclass(frozen=True)
class MaxMissing:
    """``--max-missing``: a number of images, or a percentage of them."""

    value: float
    percent: bool

    def __call__(self, total: int) -> int:
        """The number of images allowed to be missing of ``total``."""
        return int(total * self.value / 100) if self.percent else int(self.value)

    @classmethod
    def parse(cls, text: str) -> MaxMissing:
        """From "25" or "0.5%"."""
        percent = text.endswith("%")
        try:
            value = float(text[:-1]) if percent else int(text)
        except ValueError:
            value = -1.0
        if value < 0 or (percent and value > 100):
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither a count nor a percentage like 0.5%"
            )
        return cls(value, percent)


def positive(text: str) -> int:
    """A whole number above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def add_output(parser: argparse.ArgumentParser, *, shard_size: int) -> None:
    """Add the options of the shard writer."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder to write; the same command goes on with a build that was stopped",
    )
    group.add_argument(
        "--resize",
        type=positive,
        metavar="PIXELS",
        help="scale images down to this shorter side (JPEG quality 95); default: files as they are",
    )
    group.add_argument(
        "--shard-size",
        type=positive,
        default=shard_size,
        metavar="N",
        help=f"samples per shard; default {shard_size}",
    )
    group.add_argument(
        "--workers",
        type=positive,
        default=default_workers(),
        metavar="N",
        help="processes; default: one per CPU. The result does not depend on it",
    )


def absolute(path: str | os.PathLike[str] | None) -> str | None:
    """An absolute path, so that a resume from another folder is the same command."""
    return None if path is None else os.path.abspath(path)


def existing_file(path: str, flag: str) -> Path:
    """``path`` as an absolute path.

    Raises:
        FileNotFoundError: naming the flag, if there is no such file.
    """
    found = Path(os.path.abspath(path))
    if not found.is_file():
        raise FileNotFoundError(f"{flag} {path}: no such file")
    return found


def summary(output: Path, result: Result) -> str:
    """What was written, and what was not."""
    shards = len(result.shards)
    lines = [f"{output}: {result.samples} samples in {shards} shard{'s' if shards > 1 else ''}."]
    for counts, what in ((result.dropped, "Dropped"), (result.skipped, "Left out")):
        if counts:
            listed = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
            lines.append(f"{what}: {listed}.")
    if result.dropped:
        lines.append(f"Which were dropped, and why: {output / DROPPED_FILE}")
    return "\n".join(lines)
