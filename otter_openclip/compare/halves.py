"""The test images in two halves: by one settings are chosen, of the other the figures are reported."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, compress
from pathlib import Path

import numpy as np

from otter_openclip.evaluation.validator import Folder, check_webdataset
from otter_openclip.files import write_text
from otter_openclip.shards import read
from otter_openclip.shards.write import COUNT_FILE, TYPE_FILE, label_vector, write_shard

CHOOSING, REPORTING = "choosing", "reporting"
LEAST = 20  # images, to be halved


def write_halves(source: str, out: Path) -> tuple[dict[str, Path], int]:
    """The folder of each half of a labelled webdataset, below ``out``, and how many images it has.

    Raises:
        ValueError: naming what of ``--eval`` cannot be used, or cannot tell methods apart.
    """
    checked, digest = check_webdataset(source, flag="--eval"), hashlib.sha256()
    count, labels = 0, set()
    for shard in checked.shards:
        try:
            for image, vector in map(dict.values, _samples(checked, shard)):
                read.check_image(image)
                digest.update(image + vector)
                count += 1
                labels.add(vector)
        except (OSError, read.SampleError) as error:
            where = f"{shard}, sample {count} of all"
            raise ValueError(f"--eval {source} cannot be used: {where}: {error}") from error
    if count < LEAST:
        raise ValueError(f"--eval {source}: {count} images are too few to halve; give {LEAST}")
    if len(labels) == 1:
        raise ValueError(f"--eval {source}: all images have the same labels, which tells nothing")
    order = np.random.default_rng(0).permutation(count)
    texts = {path.name: path.read_text(encoding="utf-8") for path in Path(source).glob("*.txt")}
    halves = {}
    for half, part in zip((CHOOSING, REPORTING), np.array_split(order, 2), strict=True):
        halves[half] = folder = out / digest.hexdigest()[:12] / half
        if not (folder / "test" / COUNT_FILE).is_file():  # its features are known by its time
            everything = chain.from_iterable(_samples(checked, shard) for shard in checked.shards)
            in_part = np.isin(np.arange(count), part)
            write_labelled(folder, compress(everything, in_part), texts)
    return halves, count


def _samples(checked: Folder, shard: str) -> Iterator[dict[str, bytes]]:
    """Image and label vector, by suffix, of a shard's samples."""
    for _, files in read.samples(shard, strict=True):
        true = read.labels(files, checked.suffix, checked.classes)
        image = read.image_file(files)
        kind = next(kind for kind in read.IMAGES if kind in files)
        yield {kind: image, "npy": label_vector(true, checked.classes)}


def write_labelled(
    folder: Path, samples: Iterable[Mapping[str, bytes]], texts: Mapping[str, str]
) -> None:
    """Write a labelled webdataset of images with label vectors; ``texts`` are its files of text."""
    (folder / "test").mkdir(parents=True, exist_ok=True)
    for name, text in {**texts, TYPE_FILE: "multilabel"}.items():
        write_text(folder / name, text)
    numbered = ((f"{n:06d}", files) for n, files in enumerate(samples))
    write_shard(folder / "test" / "0.tar", numbered)
    write_text(folder / "test" / COUNT_FILE, "1")
