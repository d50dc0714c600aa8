"""The test images in two halves: by one settings are chosen, of the other the figures are reported."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from otter_openclip.evaluation.validator import check_webdataset
from otter_openclip.shards import read
from otter_openclip.shards.write import COUNT_FILE, TYPE_FILE, write_shard

HALVES = ("choosing", "reporting")
LEAST = 20  # images, to be halved

Sample = tuple[str, dict[str, bytes]]


def read_labelled(folder: str) -> tuple[list[Sample], int]:
    """Image and label vector of each sample of a labelled webdataset, and the number of classes.

    Raises:
        ValueError: naming what of ``--eval`` cannot be used, or cannot tell methods apart.
    """
    checked = check_webdataset(folder, flag="--eval")
    samples, labels = [], []
    for shard in checked.shards:
        try:
            for key, files in read.samples(shard, strict=True):
                classes = read.labels(files, checked.suffix, checked.classes)
                kind = next((kind for kind in read.IMAGES if kind in files), None)
                read.check_image(read.image_file(files))
                vector = np.zeros(checked.classes, np.uint8)
                vector[classes] = 1
                np.save(content := io.BytesIO(), vector)
                samples.append((f"{len(samples):06d}", {kind: files[kind], "npy": content.getvalue()}))
                labels.append(tuple(classes))
        except (OSError, read.SampleError) as error:
            where = shard if isinstance(error, OSError) else f"{shard}: sample {key}"
            raise ValueError(f"--eval {folder} cannot be used: {where}: {error}") from error
    if len(samples) < LEAST:
        raise ValueError(f"--eval {folder}: {len(samples)} images are too few to halve; give {LEAST}")
    if len(set(labels)) == 1:
        raise ValueError(f"--eval {folder}: every image has the same labels, which tells nothing")
    return samples, checked.classes


def write_halves(samples: Sequence[Sample], source: str, out: Path) -> dict[str, Path]:
    """The folder of each half, written below ``out`` unless it is there."""
    order = np.random.default_rng(0).permutation(len(samples))
    folders = {}
    for half, part in zip(HALVES, np.array_split(order, 2), strict=True):
        folders[half] = folder = out / half
        if (folder / "test" / COUNT_FILE).is_file():  # its features are known by its time
            continue
        (folder / "test").mkdir(parents=True, exist_ok=True)
        for path in Path(source).glob("*.txt"):
            shutil.copy(path, folder)
        (folder / TYPE_FILE).write_text("multilabel")
        write_shard(folder / "test" / "0.tar", (samples[n] for n in sorted(part)))
        (folder / "test" / COUNT_FILE).write_text("1")
    return folders
