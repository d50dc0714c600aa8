"""Multi-label zero-shot test sets as webdatasets that stock clip_benchmark reads."""

from __future__ import annotations

import argparse
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from otter_openclip.data import shards, sources
from otter_openclip.data.options import MaxMissing, absolute, add_output, summary
from otter_openclip.data.tables import lines
from otter_openclip.files import write_text

SPLIT = "test"
TEMPLATE = "a photo of {c}."
SHARD_SIZE = 1000


class Row(NamedTuple):
    """An image and its positive labels."""

    image: str
    labels: list[int]
    line: int


@dataclass(frozen=True)
class OneHot:
    """Labels as the ``npy`` uint8 vector that clip_benchmark's multi-label sets hold."""

    classes: int

    def __call__(self, labels: Sequence[int]) -> tuple[str, bytes]:
        """The suffix and content of a sample's label file."""
        vector = np.zeros(self.classes, np.uint8)
        vector[labels] = 1
        buffer = io.BytesIO()
        np.save(buffer, vector)
        return "npy", buffer.getvalue()


def add_image_options(parser: argparse.ArgumentParser, images: str) -> None:
    """Add what both builders take besides their metadata files."""
    parser.add_argument(
        "--images",
        required=True,
        nargs="+",
        metavar="PATH",
        help=f"{images}; .tar, .tar.gz or .zip; braces and wildcards are expanded",
    )
    parser.add_argument(
        "--max-missing",
        type=MaxMissing.parse,
        default=MaxMissing(0, False),
        metavar="N",
        help="images (or percent, as 0.5%%) that may be missing or undecodable; default 0",
    )
    add_output(parser, shard_size=SHARD_SIZE)


def build(
    args: argparse.Namespace,
    metadata: dict[str, Path],
    classes: Sequence[str],
    rows: Sequence[Row],
    layouts: Sequence[Callable[[str], str]],
    *,
    without_positives: int,
) -> int:
    """Build a test set from its parsed metadata; returns the command's exit code.

    Args:
        args: the options of `add_image_options`, and ``command``.
        metadata: flag -> file it was read from.
        classes: class names as they are to be prompted.
        rows: the images with labels, in order.
        layouts: from an image's name to where it may be in an image folder.
        without_positives: images left out before.
    """
    folders, archives = sources.expand(args.images)
    output = Path(os.path.abspath(args.output))
    job = shards.Build(
        output=output,
        command=args.command,
        settings={
            **{flag: str(path) for flag, path in metadata.items()},
            "images": [absolute(path) for path in args.images],
            "resize": args.resize,
            "shard-size": args.shard_size,
        },
        inputs=[*metadata.values(), *archives],
        encode=OneHot(len(classes)),
        shard_name=f"{SPLIT}/{{}}.tar",
        shard_size=args.shard_size,
        resize=args.resize,
        workers=args.workers,
        max_missing=args.max_missing,
    )

    def plan(planner: shards.Planner) -> None:
        unpacked = sources.unpacked(archives, planner.folder / "unpacked")
        planner.archives += map(str, unpacked)
        stems = [os.path.splitext(os.path.basename(row.image))[0] for row in rows]
        index = sources.index_archives(unpacked, sources.by_stem, args.workers, stems)
        if without_positives:
            planner.skip("without a positive label", without_positives)
        looked_up = tqdm(rows, "Looking for images", unit="image")
        for row, stem in zip(looked_up, stems, strict=True):
            locator = index.find(stem) or _in_folders(row.image, folders, layouts)
            if locator is None:
                planner.drop(row.image, shards.MISSING, f"line {row.line} of the labels")
            else:
                planner.add(row.image, locator, row.labels, key=stem)

    def finish(folder: Path, result: shards.Result) -> None:
        write_text(folder / "classnames.txt", "".join(f"{name}\n" for name in classes))
        write_text(folder / "zeroshot_classification_templates.txt", TEMPLATE + "\n")
        write_text(folder / "dataset_type.txt", "multilabel\n")
        shards.write_shard_count(folder, result)

    result = shards.run(job, plan, finish)
    print(summary(output, result))
    repeated = sum(count - 1 for count in Counter(classes).values() if count > 1)
    print(
        f"{len(classes)} classes"
        + (
            f", of which {repeated} repeat an earlier one's name and stay apart."
            if repeated
            else "."
        )
    )
    print(
        f"clip_benchmark eval --dataset wds/{output.name} --dataset_root {output} "
        "--task zeroshot_classification ..."
    )
    return 0


def _in_folders(
    image: str, folders: Sequence[Path], layouts: Sequence[Callable[[str], str]]
) -> list[str] | None:
    for folder in folders:
        for layout in layouts:
            path = str(folder / layout(image))
            if os.path.isfile(path):
                return [path]
    return None


def class_name(text: str, path: Path, line: int) -> str:
    """A class name that survives as one line of ``classnames.txt``.

    Raises:
        ValueError: naming file and line, if it is empty.
    """
    # split() also takes the line breaks of Unicode, at which clip_benchmark would cut the name.
    name = " ".join(text.split())
    if not name:
        raise ValueError(f"{path}:{line}: empty class name; a prompt needs one")
    return name


def check_label(label: int, classes: int, path: Path, line: int) -> int:
    """``label`` if there is such a class.

    Raises:
        ValueError: naming file, line and class list's length, if not.
    """
    if not 0 <= label < classes:
        raise ValueError(
            f"{path}:{line}: label {label} is outside the class list of {classes} "
            f"(0 to {classes - 1}); do the two files belong together?"
        )
    return label


def read_index_rows(
    path: Path, classes: int, image_name: Callable[[str], str] = str
) -> tuple[list[Row], int]:
    """Lines of an image's name and its class indices, each perhaps with a confidence (``2367:1``).

    Returns:
        (images with their positive labels, number of images without any).

    Raises:
        ValueError: naming the line, for a label outside the class list, no number, a confidence outside
            [0, 1], or a repeated image.
    """
    rows, seen, without = [], {}, 0
    for number, line in lines(path):
        if not line.strip():
            continue
        image, *entries = line.split()
        image = image_name(image)
        if image in seen:
            raise ValueError(f"{path}:{number}: {image} again, first in line {seen[image]}")
        seen[image] = number
        labels = []
        for entry in entries:
            text, _, confidence = entry.partition(":")
            try:
                label, sure = int(text), float(confidence or 1)
            except ValueError:
                raise ValueError(
                    f"{path}:{number}: {entry!r} is neither a class index nor index:confidence"
                ) from None
            if not 0 <= sure <= 1:
                raise ValueError(f"{path}:{number}: confidence {confidence} is not in [0, 1]")
            check_label(label, classes, path, number)
            if sure > 0 and label not in labels:
                labels.append(label)
        if labels:
            rows.append(Row(image, labels, number))
        else:
            without += 1
    if not rows:
        raise ValueError(f"{path}: no image with a label in it")
    return rows, without
