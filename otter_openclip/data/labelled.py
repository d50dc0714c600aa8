"""Multi-label zero-shot test sets as webdatasets that stock clip_benchmark reads."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from otter_openclip import cli
from otter_openclip.data.building import Build, add_output
from otter_openclip.data.lookup import Paths
from otter_openclip.data.plan import Plan
from otter_openclip.data.sources import PATHS, absolute
from otter_openclip.data.tables import at, lines
from otter_openclip.files import write_text
from otter_openclip.shards import write

SPLIT = "test"


class Row(NamedTuple):
    """An image and its positive labels."""

    image: str
    labels: list[int]
    line: int


def add_arguments(parser: argparse.ArgumentParser, classes: str, labels: str, images: str) -> None:
    """Add what both builders take, with their own words on the three inputs."""
    add = parser.add_argument
    add("--classes", required=True, type=absolute, metavar="FILE", help=classes)
    add("--labels", required=True, type=absolute, metavar="FILE", help=labels)
    text = f"{images}; .tar, .tar.gz or .zip"
    add("--images", required=True, help=text, **PATHS)
    text = "images that may be missing or undecodable; default 0"
    add("--max-missing", type=cli.number(0, kind=int), default=0, metavar="N", help=text)
    add_output(parser, shard_size=1000)


def build(args: argparse.Namespace, classes: Sequence[str], rows: Sequence[Row]) -> int:
    """Build a test set; returns the exit code. Rows without a positive label are left out."""
    images = Paths(args.images, any_suffix=True)

    def fill(plan: Plan) -> None:
        for image, labels, line in tqdm(rows, "Looking for images", unit="image"):
            if not labels:
                plan.skip("without a positive label")
                continue
            picture, numbers = images.find(image), " ".join(map(str, labels))
            plan.add(image, picture, numbers, key=key_of(image), where=f"line {line} of the labels")

    def finish(folder: Path, plan: Plan) -> None:
        write_text(folder / write.CLASSES_FILE, "".join(f"{name}\n" for name in classes))
        write_text(folder / write.TEMPLATES_FILE, "a photo of {c}.\n")
        write_text(folder / write.TYPE_FILE, "multilabel\n")
        write_text(folder / SPLIT / write.COUNT_FILE, f"{plan.report()['shards']}\n")

    def encode(numbers: str) -> bytes:
        return write.label_vector(map(int, numbers.split()), len(classes))

    kind = {"suffix": "npy", "encode": encode, "shard_name": f"{SPLIT}/{{}}.tar", "record": "image"}
    Build(args, [args.classes, args.labels], images, fill, finish=finish, **kind).run()
    print(f"{len(classes)} classes.")
    where = f"--dataset wds/{os.path.basename(args.output)} --dataset_root {args.output}"
    print(f"clip_benchmark eval {where} --task zeroshot_classification ...")
    return 0


def key_of(image: str) -> str:
    """An image's key: its file's name without folder and suffix."""
    return os.path.splitext(os.path.basename(image))[0]


def class_name(text: str, path: str, line: int) -> str:
    """A class name that survives as one line of ``classnames.txt``; ValueError if it is empty."""
    # split() also takes the line breaks of Unicode, at which clip_benchmark would cut the name.
    if name := " ".join(text.split()):
        return name
    raise at(path, line, "empty class name; a prompt needs one")


def read_index_rows(path: str, classes: int) -> list[Row]:
    """Lines of an image's name and its class indices, each perhaps with a confidence (``2367:1``).

    ValueError names the line of a label outside the class list or no number.
    """
    rows: list[Row] = []
    for number, line in lines(path):
        if not line.strip():
            continue
        image, *entries = line.split()
        row = Row(image, [], number)
        rows.append(row)
        for entry in entries:
            text, colon, confidence = entry.partition(":")
            try:  # "2:" is an entry that a blank has cut
                label, sure = int(text), float(confidence if colon else 1)
            except ValueError:
                fault = f"{entry!r} is neither a class index nor index:confidence"
                raise at(path, number, fault) from None
            if not 0 <= label < classes:
                fault = f"label {label} is outside the class list of {classes} (0 to {classes - 1})"
                raise at(path, number, f"{fault}; do the two files belong together?")
            if sure > 0 and label not in row.labels:
                row.labels.append(label)
    return rows
