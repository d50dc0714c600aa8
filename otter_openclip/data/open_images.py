"""Google Open Images' test split as a multi-label zero-shot set for clip_benchmark.

Takes the official files as downloaded, class-descriptions CSV and human-verified image labels CSV, or
the OTTER reference's goi_classes.txt and goi_images.txt, and the images as a folder or archives of
ImageID.jpg. Only labels with confidence 1 count; images without one are left out. Prompts use the
class descriptions as they are; twelve of them occur twice and stay two classes.
"""

from __future__ import annotations

import argparse
import re

from otter_openclip.data import labelled, tables
from otter_openclip.data.labelled import Row, class_name
from otter_openclip.data.tables import at

# A class's id, /m/011k07 or /g/11bc6sh46d.
_MID = re.compile(r"/[a-z]/[0-9a-z_]+")
_CLASS_COLUMNS = ["LabelName", "DisplayName"]
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
    mids, names = read_classes(args.classes)
    _, first = next(tables.lines(args.labels), (1, ""))
    if "," not in first and _LABEL_COLUMNS[0] not in first:
        # The reference's goi_images.txt: file name and class indices, separated by tabs.
        rows = labelled.read_index_rows(args.labels, len(names))
    elif mids:
        rows = read_labels(args.labels, mids, args.classes)
    else:
        fault = f"has no class ids (/m/...), by which {args.labels} names its labels"
        fix = "give the class-descriptions CSV, or goi_images.txt as --labels"
        raise ValueError(f"{args.classes} {fault}; {fix}")
    return labelled.build(args, names, rows)


def read_classes(path: str) -> tuple[dict[str, int], list[str]]:
    """(class id -> index, class names) of a class file, whose header some releases leave out.

    There are no ids in a list of bare names, the reference's goi_classes.txt.
    ValueError names the line of an empty name, a repeated id or a malformed row.
    """
    mids: dict[str, int] = {}
    names = []
    listed = list(tables.lines(path))
    while listed and not listed[-1][1].strip():
        listed.pop()
    if not any(_MID.match(line.removeprefix('"')) for _, line in listed):
        return mids, [class_name(line, path, number) for number, line in listed]
    for number, row in tables.rows(path, ","):
        if number == 1 and row == _CLASS_COLUMNS:
            continue
        if len(row) != 2 or not _MID.fullmatch(row[0]):
            raise at(path, number, f"expected a class id and a name, got {row}")
        if row[0] in mids:
            raise at(path, number, f"class {row[0]} again, first as number {mids[row[0]]}")
        mids[row[0]] = len(names)
        names.append(class_name(row[1], path, number))
    return mids, names


def read_labels(path: str, mids: dict[str, int], class_file: str) -> list[Row]:
    """Images with their positive labels, from the official form.

    ValueError names the line of a label outside the class list, or a confidence but 0 and 1.
    """
    rows: dict[str, Row] = {}
    for number, (image, mid, confidence) in tables.table(
        path, _LABEL_COLUMNS, tables.separator_of(path)
    ):
        if mid not in mids:
            fault = f"label {mid} is outside the class list {class_file} of {len(mids)}"
            raise at(path, number, f"{fault}; do the two files belong together?")
        if confidence not in ("0", "0.0", "1", "1.0"):
            fault = f"confidence {confidence!r}, where people's verdicts are 0 or 1"
            fix = "give the human-imagelabels file, not the machine-imagelabels one"
            raise at(path, number, f"{fault}; {fix}")
        labels = rows.setdefault(image, Row(image, [], number)).labels
        if confidence[0] == "1" and mids[mid] not in labels:
            labels.append(mids[mid])
    return list(rows.values())
