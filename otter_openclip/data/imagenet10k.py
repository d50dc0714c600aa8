"""ImageNet-10K, Tencent ML-Images' validation images from ImageNet, as a multi-label zero-shot set.

Takes dictionary_and_semantic_hierarchy.txt (or the OTTER reference's tencent_classes.txt, the same),
val_image_id_from_imagenet.txt with or without confidences (2367:1), and the ImageNet images as a folder
or archives, tars of tars included. A class "a, b, c" is prompted as "a,or b,or c", as in the reference,
and classnames.txt holds that form.
"""

from __future__ import annotations

import argparse
import re

from otter_openclip.data import labelled
from otter_openclip.data.tables import at, lines

# Blanks, not only tabs: the reference's copy has "-1  thing" in its first class, and prompts all of it.
_LINE = re.compile(r"(?P<index>\d+)\s+(?P<id>\S+)\s+(?P<parent>-?\d+)[ \t](?P<names>.*)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    labelled.add_arguments(
        parser,
        "dictionary_and_semantic_hierarchy.txt, or tencent_classes.txt",
        "val_image_id_from_imagenet.txt",
        "folder or archives of n01440764_10026.JPEG, in folders per synset or not",
    )


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    names = read_classes(args.classes)
    return labelled.build(args, names, labelled.read_index_rows(args.labels, len(names)))


def read_classes(path: str) -> list[str]:
    """The dictionary's class names in the form they are prompted in.

    ValueError names a line that is malformed or out of order, or whose name is empty.
    """
    names: list[str] = []
    for number, line in lines(path):
        if line.startswith("category_index") or not line.strip():
            continue
        if (match := _LINE.fullmatch(line)) is None:
            raise at(path, number, f"{line!r} is not index, WordNet id, parent's index and names")
        if int(match["index"]) != len(names):
            raise at(path, number, f"class {match['index']} where {len(names)} is due")
        parts = (part.strip() for part in match["names"].split(", "))
        # The reference's data/dataset_factory.py.
        names.append(labelled.class_name(",or ".join(parts), path, number))
    if not names:
        raise ValueError(f"{path}: no classes in it")
    return names
