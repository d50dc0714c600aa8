"""The test images in two halves: by one settings are chosen, of the other the figures are reported."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from otter_openclip.evaluation.validator import check_webdataset
from otter_openclip.files import write_text
from otter_openclip.shards import read
from otter_openclip.shards.write import COUNT_FILE, TYPE_FILE, write_shard

CHOOSING, REPORTING = "choosing", "reporting"
LEAST = 20  # images, to be halved


def write_halves(source: str, out: Path) -> tuple[dict[str, Path], int]:
    """The folder of each half of a labelled webdataset, below ``out``, and how many images it has.

    Raises:
        ValueError: naming what of ``--eval`` cannot be used, or cannot tell methods apart.
    """
    checked, samples, digest = check_webdataset(source, flag="--eval"), [], hashlib.sha256()
    for shard in checked.shards:
        try:
            for _, files in read.samples(shard, strict=True):
                true = read.labels(files, checked.suffix, checked.classes)
                image = read.image_file(files)
                read.check_image(image)
                kind = next(kind for kind in read.IMAGES if kind in files)
                samples.append({kind: image, "npy": label_vector(true, checked.classes)})
                digest.update(image + samples[-1]["npy"])
        except (OSError, read.SampleError) as error:
            where = f"{shard}, sample {len(samples)} of all"
            raise ValueError(f"--eval {source} cannot be used: {where}: {error}") from error
    if len(samples) < LEAST:
        raise ValueError(
            f"--eval {source}: {len(samples)} images are too few to halve; give {LEAST}"
        )
    if len({files["npy"] for files in samples}) == 1:
        raise ValueError(f"--eval {source}: all images have the same labels, which tells nothing")
    order = np.random.default_rng(0).permutation(len(samples))
    texts = {path.name: path.read_text(encoding="utf-8") for path in Path(source).glob("*.txt")}
    halves = {}
    for half, part in zip((CHOOSING, REPORTING), np.array_split(order, 2), strict=True):
        halves[half] = folder = out / digest.hexdigest()[:12] / half
        if not (folder / "test" / COUNT_FILE).is_file():  # its features are known by its time
            write_labelled(folder, [samples[n] for n in sorted(part)], texts)
    return halves, len(samples)


def label_vector(true: Iterable[int], classes: int) -> bytes:
    """The file that says which of the classes are ``true``."""
    vector = np.zeros(classes, np.uint8)
    vector[list(true)] = 1
    np.save(content := io.BytesIO(), vector)
    return content.getvalue()


def write_labelled(
    folder: Path, samples: Sequence[Mapping[str, bytes]], texts: Mapping[str, str]
) -> None:
    """Write a labelled webdataset of images with label vectors; ``texts`` are its files of text."""
    (folder / "test").mkdir(parents=True, exist_ok=True)
    for name, text in {**texts, TYPE_FILE: "multilabel"}.items():
        write_text(folder / name, text)
    numbered = ((f"{n:06d}", files) for n, files in enumerate(samples))
    write_shard(folder / "test" / "0.tar", numbered)
    write_text(folder / "test" / COUNT_FILE, "1")
