"""Google Open Images' test split as a multi-label zero-shot set for clip_benchmark.

Takes the official files as downloaded, class-descriptions CSV and human-verified image labels CSV, or
the OTTER reference's goi_classes.txt and goi_images.txt, and the images as a folder or archives of
ImageID.jpg. Only labels with confidence 1 count; images without one are left out. Prompts use the
class descriptions as they are; twelve of them occur twice and stay two classes.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from otter_openclip.data import labelled
from otter_openclip.data.labelled import Row, class_name
from otter_openclip.data.options import existing_file
from otter_openclip.data.tables import csv_rows, first_line, lines

# A class's id, /m/011k07 or /g/11bc6sh46d.
_MID = re.compile(r"/[a-z]/[0-9a-z_]+")
_CLASS_HEADER = ["LabelName", "DisplayName"]
_LABEL_COLUMNS = ("ImageID", "LabelName", "Confidence")
_LAYOUTS = (lambda name: f"{name}.jpg", lambda name: f"{labelled.SPLIT}/{name}.jpg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument(
        "--classes",
        required=True,
        metavar="FILE",
        help="oidv6-class-descriptions.csv or class-descriptions.csv, or goi_classes.txt",
    )
    parser.add_argument(
        "--labels",
        required=True,
        metavar="FILE",
        help="test-annotations-human-imagelabels.csv, or goi_images.txt",
    )
    labelled.add_image_options(parser, "folder or archives of ImageID.jpg")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    class_file = existing_file(args.classes, "--classes")
    label_file = existing_file(args.labels, "--labels")
    mids, names = read_classes(class_file)
    if not first_line(label_file).startswith("ImageID,"):
        rows, without = read_reference_labels(label_file, len(names))
    elif mids is None:
        raise ValueError(
            f"{class_file} has no class ids (/m/...), by which {label_file} names its labels; give "
            "the class-descriptions CSV, or goi_images.txt as --labels"
        )
    else:
        rows, without = read_labels(label_file, mids, class_file)
    return labelled.build(
        args,
        {"classes": class_file, "labels": label_file},
        names,
        rows,
        _LAYOUTS,
        without_positives=without,
    )


def read_classes(path: Path) -> tuple[dict[str, int] | None, list[str]]:
    """The class list.

    Returns:
        (class id -> index, or None for a list of bare names; class names).

    Raises:
        ValueError: naming the line, for an empty name, a repeated id or a malformed row.
    """
    first = first_line(path).split(",")
    if first != _CLASS_HEADER and not _MID.fullmatch(first[0]):
        named = [class_name(line, path, number) for number, line in _all_but_last_blank(path)]
        return None, named
    mids: dict[str, int] = {}
    names = []
    for number, row in csv_rows(path):
        if row == _CLASS_HEADER:
            continue
        if len(row) != 2 or not _MID.fullmatch(row[0]):
            raise ValueError(f"{path}:{number}: expected a class id and a name, got {row}")
        if row[0] in mids:
            raise ValueError(
                f"{path}:{number}: class {row[0]} again, first as number {mids[row[0]]}"
            )
        mids[row[0]] = len(names)
        names.append(class_name(row[1], path, number))
    return mids, names


def _all_but_last_blank(path: Path) -> list[tuple[int, str]]:
    listed = list(lines(path))
    while listed and not listed[-1][1].strip():
        listed.pop()
    return listed


def read_labels(path: Path, mids: dict[str, int], class_file: Path) -> tuple[list[Row], int]:
    """Human-verified image labels, official form.

    Returns:
        (images with their positive labels in the order of the file, number of images without any).

    Raises:
        ValueError: naming the line, for a label outside the class list or a confidence but 0 and 1.
    """
    rows = csv_rows(path)
    number, header = next(rows)
    missing = [name for name in _LABEL_COLUMNS if name not in header]
    if missing:
        raise ValueError(f"{path}:{number}: no column {missing[0]} in {header}")
    image_column, label_column, confidence_column = (header.index(n) for n in _LABEL_COLUMNS)
    positives: dict[str, list[int]] = {}
    first_seen: dict[str, int] = {}
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}:{number}: {len(row)} fields, the header has {len(header)}")
        image, mid, confidence = row[image_column], row[label_column], row[confidence_column]
        if mid not in mids:
            raise ValueError(
                f"{path}:{number}: label {mid} is outside the class list {class_file} of {len(mids)}; "
                "do the two files belong together?"
            )
        labels = positives.setdefault(image, [])
        first_seen.setdefault(image, number)
        if confidence in ("1", "1.0"):
            if mids[mid] not in labels:
                labels.append(mids[mid])
        elif confidence not in ("0", "0.0"):
            raise ValueError(
                f"{path}:{number}: confidence {confidence!r}, where people's verdicts are 0 or 1; "
                "give the human-imagelabels file, not the machine-imagelabels one"
            )
    kept = [Row(i, labels, first_seen[i]) for i, labels in positives.items() if labels]
    return kept, len(positives) - len(kept)


def read_reference_labels(path: Path, classes: int) -> tuple[list[Row], int]:
    """The reference's goi_images.txt: file name and class indices, separated by tabs.

    Returns:
        (images with their labels, number of images without any).

    Raises:
        ValueError: naming the line, for a label outside the class list, no number, or a repeated image.
    """
    return labelled.read_index_rows(path, classes, lambda name: Path(name).stem)
