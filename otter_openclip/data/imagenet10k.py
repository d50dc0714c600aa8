"""ImageNet-10K, Tencent ML-Images' validation images from ImageNet, as a multi-label zero-shot set.

Takes dictionary_and_semantic_hierarchy.txt (or the OTTER reference's tencent_classes.txt, the same),
val_image_id_from_imagenet.txt with or without confidences (2367:1), and the ImageNet images as a folder
or archives, tars of tars included. A class "a, b, c" is prompted as "a,or b,or c", as in the reference,
and classnames.txt holds that form.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from otter_openclip.data import labelled
from otter_openclip.data.labelled import class_name
from otter_openclip.data.options import existing_file
from otter_openclip.data.tables import lines

# Blanks, not only tabs: the reference's copy has "-1  thing" in its first class, and prompts all of it.
_LINE = re.compile(r"(?P<index>\d+)\s+(?P<id>\S+)\s+(?P<parent>-?\d+)[ \t](?P<names>.*)")
_LAYOUTS = (lambda name: name, lambda name: f"images/{name}", os.path.basename)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument(
        "--classes",
        required=True,
        metavar="FILE",
        help="dictionary_and_semantic_hierarchy.txt, or tencent_classes.txt",
    )
    parser.add_argument(
        "--labels", required=True, metavar="FILE", help="val_image_id_from_imagenet.txt"
    )
    labelled.add_image_options(
        parser, "folder or archives of n01440764_10026.JPEG, in folders per synset or not"
    )


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    class_file = existing_file(args.classes, "--classes")
    label_file = existing_file(args.labels, "--labels")
    names = read_classes(class_file)
    rows, without = labelled.read_index_rows(label_file, len(names))
    return labelled.build(
        args,
        {"classes": class_file, "labels": label_file},
        names,
        rows,
        _LAYOUTS,
        without_positives=without,
    )


def read_classes(path: Path) -> list[str]:
    """The dictionary's class names in the form they are prompted in.

    Raises:
        ValueError: naming the line, if it is malformed, out of order or its name is empty.
    """
    names: list[str] = []
    for number, line in lines(path):
        if line.startswith("category_index") or not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{path}:{number}: {line!r} is not index, WordNet id, parent's index and names"
            )
        if int(match["index"]) != len(names):
            raise ValueError(f"{path}:{number}: class {match['index']} where {len(names)} is due")
        names.append(class_name(prompt_form(match["names"]), path, number))
    if not names:
        raise ValueError(f"{path}: no classes in it")
    return names


def prompt_form(name: str) -> str:
    """ "a, b, c" as "a,or b,or c" (the reference's data/dataset_factory.py)."""
    return ",or ".join(part.strip() for part in name.split(", "))
