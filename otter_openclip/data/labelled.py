"""Multi-label zero-shot test sets as webdatasets that stock clip_benchmark reads."""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from otter_openclip.data import building, lookup, options, sources
from otter_openclip.data.plan import Plan
from otter_openclip.data.tables import lines
from otter_openclip.evaluation.folders import Folder
from otter_openclip.evaluation.prompts import name_faults
from otter_openclip.files import write_text

SPLIT = "test"
TEMPLATE = "a photo of {c}."
SHARD_SIZE = 1000


class Row(NamedTuple):
    """An image and its positive labels."""

    image: str
    labels: list[int]
    line: int


def add_arguments(parser: argparse.ArgumentParser, classes: str, labels: str, images: str) -> None:
    """Add what both builders take, with their own words on the three inputs."""
    add = parser.add_argument
    add("--classes", required=True, metavar="FILE", help=classes)
    add("--labels", required=True, metavar="FILE", help=labels)
    text = f"{images}; .tar, .tar.gz or .zip; braces and wildcards are expanded"
    add("--images", required=True, nargs="+", metavar="PATH", help=text)
    kind = options.max_missing
    text = "images (or percent, as 0.5%%) that may be missing or undecodable; default 0"
    add("--max-missing", type=kind, default=kind("0"), metavar="N", help=text)
    options.add_output(parser, shard_size=SHARD_SIZE)


def build(
    args: argparse.Namespace,
    classes: Sequence[str],
    rows: Sequence[Row],
    without: int,
    paths: Callable[[str], Sequence[str]],
) -> int:
    """Build a test set from its parsed metadata; returns the command's exit code.

    Args:
        args: the options of `add_arguments`, and ``command``.
        classes: class names as they are to be prompted.
        rows: the images with labels, in order.
        without: number of images without labels, left out before.
        paths: from an image's name to where it may be in a folder or archive.
    """
    folders, archives = sources.expand(args.images)
    for fault in name_faults(classes):
        raise ValueError(f"--classes {args.classes}: {fault}")

    def encode(labels: Sequence[int]) -> tuple[str, bytes]:
        """Labels as the ``npy`` uint8 vector that clip_benchmark's multi-label sets hold."""
        vector, buffer = np.zeros(len(classes), np.uint8), io.BytesIO()
        vector[labels] = 1
        np.save(buffer, vector)
        return "npy", buffer.getvalue()

    def fill(plan: Plan) -> None:
        place = plan.index, folders, archives, plan.folder / "unpacked"
        images = lookup.Paths(*place, any_suffix=True)
        if without:
            plan.skip("without a positive label", without)
        for row in tqdm(rows, "Looking for images", unit="image"):
            key = os.path.splitext(os.path.basename(row.image))[0]
            found = images.find(*paths(row.image))
            plan.add(row.image, found, row.labels, key=key, where=f"line {row.line} of the labels")

    def finish(folder: Path, plan: Plan) -> None:
        write_text(folder / "classnames.txt", "".join(f"{name}\n" for name in classes))
        write_text(folder / "zeroshot_classification_templates.txt", TEMPLATE + "\n")
        write_text(folder / "dataset_type.txt", "multilabel\n")
        write_text(folder / SPLIT / "nshards.txt", f"{plan.report()['shards']}\n")
        if faults := Folder(folder, SPLIT).faults:
            raise ValueError(str(faults[0]))

    files = {"classes": sources.absolute(args.classes), "labels": sources.absolute(args.labels)}
    inputs, name = [*files.values(), *archives], f"{SPLIT}/{{}}.tar"
    job = building.Build(args, files, inputs, encode, name, "image", max_missing=args.max_missing)
    report = building.run(job, fill, finish)
    options.print_summary(job.shown, report)
    repeated = len(classes) - len(set(classes))
    note = f", of which {repeated} repeat an earlier one's name and stay apart" if repeated else ""
    print(f"{len(classes)} classes{note}.")
    where = f"--dataset wds/{os.path.basename(job.shown)} --dataset_root {job.shown}"
    print(f"clip_benchmark eval {where} --task zeroshot_classification ...")
    return 0


def class_name(text: str, path: str, line: int) -> str:
    """A class name that survives as one line of ``classnames.txt``; ValueError if it is empty."""
    # split() also takes the line breaks of Unicode, at which clip_benchmark would cut the name.
    if name := " ".join(text.split()):
        return name
    raise ValueError(f"{path}:{line}: empty class name; a prompt needs one")


def read_index_rows(
    path: str, classes: int, image_name: Callable[[str], str] = str
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
            text, colon, confidence = entry.partition(":")
            try:  # "2:" is an entry that a blank has cut
                label, sure = int(text), float(confidence if colon else 1)
            except ValueError:
                fault = f"{entry!r} is neither a class index nor index:confidence"
                raise ValueError(f"{path}:{number}: {fault}") from None
            if not 0 <= sure <= 1:
                raise ValueError(f"{path}:{number}: confidence {confidence} is not in [0, 1]")
            if not 0 <= label < classes:
                fault = f"label {label} is outside the class list of {classes} (0 to {classes - 1})"
                raise ValueError(f"{path}:{number}: {fault}; do the two files belong together?")
            if sure > 0 and label not in labels:
                labels.append(label)
        if labels:
            rows.append(Row(image, labels, number))
        without += not labels
    if not rows:
        raise ValueError(f"{path}: no image with a label in it")
    return rows, without
