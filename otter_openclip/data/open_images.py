"""Google Open Images' test split as a multi-label zero-shot set for clip_benchmark.

Takes the official files as downloaded, class-descriptions CSV and human-verified image labels CSV, or
the OTTER reference's goi_classes.txt and goi_images.txt, and the images as a folder or archives of
ImageID.jpg. Only labels with confidence 1 count; images without one are left out. Prompts use the
class descriptions as they are; twelve of them occur twice and stay two classes.
"""

from __future__ import annotations

import argparse
import os
import re

from otter_openclip.data import labelled, tables
from otter_openclip.data.labelled import Row, class_name
from otter_openclip.data.options import existing_file

# A class's id, /m/011k07 or /g/11bc6sh46d.
_MID = re.compile(r"/[a-z]/[0-9a-z_]+")
_CLASS_COLUMNS = ("LabelName", "DisplayName")
_LABEL_COLUMNS = ("ImageID", "LabelName", "Confidence")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    labelled.add_arguments(
        parser,
        "oidv6-class-descriptions.csv or class-descriptions.csv, or goi_classes.txt",
        "test-annotations-human-imagelabels.csv, or goi_images.txt",
        "folder or archives of ImageID.jpg",
    )


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    class_file = existing_file(args.classes, "--classes")
    label_file = existing_file(args.labels, "--labels")
    mids, names = read_classes(class_file)
    if _LABEL_COLUMNS[0] not in tables.header(label_file, _LABEL_COLUMNS)[1]:
        # The reference's goi_images.txt: file name and class indices, separated by tabs.
        without_suffix = lambda name: os.path.splitext(os.path.basename(name))[0]  # noqa: E731
        rows, without = labelled.read_index_rows(label_file, len(names), without_suffix)
    elif mids is None:
        raise ValueError(
            f"{class_file} has no class ids (/m/...), by which {label_file} names its labels; give "
            "the class-descriptions CSV, or goi_images.txt as --labels"
        )
    else:
        rows, without = read_labels(label_file, mids, class_file)
    paths = lambda name: (f"{name}.jpg", f"{labelled.SPLIT}/{name}.jpg")  # noqa: E731
    return labelled.build(args, names, rows, without, paths)


def read_classes(path: str) -> tuple[dict[str, int] | None, list[str]]:
    """(class id -> index, or None for a list of bare names; class names) of a class file.

    Raises:
        ValueError: naming the line, for an empty name, a repeated id or a malformed row.
    """
    separator, first = tables.header(path, _CLASS_COLUMNS)
    headed = set(_CLASS_COLUMNS) <= set(first)
    if not headed and not _MID.fullmatch(first[0]):
        listed = list(tables.lines(path))
        while not listed[-1][1].strip():
            listed.pop()
        return None, [class_name(line, path, number) for number, line in listed]
    rows = tables.table(path, _CLASS_COLUMNS, separator) if headed else tables.rows(path, separator)
    mids: dict[str, int] = {}
    names = []
    for number, row in rows:
        if len(row) != 2 or not _MID.fullmatch(row[0]):
            raise ValueError(f"{path}:{number}: expected a class id and a name, got {row}")
        if row[0] in mids:
            fault = f"class {row[0]} again, first as number {mids[row[0]]}"
            raise ValueError(f"{path}:{number}: {fault}")
        mids[row[0]] = len(names)
        names.append(class_name(row[1], path, number))
    return mids, names


def read_labels(path: str, mids: dict[str, int], class_file: str) -> tuple[list[Row], int]:
    """(images with their positive labels, number of images without any) of the official form.

    Raises:
        ValueError: naming the line, for a label outside the class list or a confidence but 0 and 1.
    """
    rows: dict[str, Row] = {}
    for number, (image, mid, confidence) in tables.table(path, _LABEL_COLUMNS):
        if mid not in mids:
            fault = f"label {mid} is outside the class list {class_file} of {len(mids)}"
            raise ValueError(f"{path}:{number}: {fault}; do the two files belong together?")
        if confidence not in ("0", "0.0", "1", "1.0"):
            raise ValueError(
                f"{path}:{number}: confidence {confidence!r}, where people's verdicts are 0 or 1; "
                "give the human-imagelabels file, not the machine-imagelabels one"
            )
        labels = rows.setdefault(image, Row(image, [], number)).labels
        if confidence[0] == "1" and mids[mid] not in labels:
            labels.append(mids[mid])
    kept = [row for row in rows.values() if row.labels]
    return kept, len(rows) - len(kept)
