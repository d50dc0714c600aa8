"""Webdataset shards written: whole or not at all, and of the same samples always the same bytes."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Mapping

import numpy as np

from otter_openclip.files import written_whole

# What lies beside shards: of training pairs, open_clip's numbers of samples by the shard's name; of an
# evaluation set, clip_benchmark's files of text.
SIZES_FILE = "sizes.json"
CLASSES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
TYPE_FILE, COUNT_FILE = "dataset_type.txt", "nshards.txt"


def label_vector(true: Iterable[int], classes: int) -> bytes:
    """The ``npy`` of clip_benchmark's multi-label sets: which of the classes are ``true``."""
    vector = np.zeros(classes, np.uint8)
    vector[list(true)] = 1
    np.save(content := io.BytesIO(), vector)
    return content.getvalue()


def write_shard(
    path: str | os.PathLike[str], samples: Iterable[tuple[str, Mapping[str, bytes]]]
) -> int:
    """Write a tar of (key, suffix -> content) samples into a folder that exists; how many they were."""
    count = 0
    with written_whole(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for key, files in samples:
            count += 1
            # As webdataset's TarWriter does, which takes torch, 2 s and 600 MB, to import.
            for suffix, content in sorted(files.items()):
                member = tarfile.TarInfo(f"{key}.{suffix}")  # no owner, no date: the same each time
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return count
