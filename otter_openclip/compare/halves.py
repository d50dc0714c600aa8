"""The test images in two halves: by one settings are chosen, of the other the figures are reported."""

from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path

import numpy as np

from otter_openclip.evaluation.validator import check_webdataset
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
                vector = np.zeros(checked.classes, np.uint8)
                vector[read.labels(files, checked.suffix, checked.classes)] = 1
                np.save(content := io.BytesIO(), vector)
                kind = next((kind for kind in read.IMAGES if kind in files), "")
                read.check_image(read.image_file(files))
                samples.append({kind: files[kind], "npy": content.getvalue()})
                digest.update(files[kind] + content.getvalue())
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
    halves = {}
    for half, part in zip((CHOOSING, REPORTING), np.array_split(order, 2), strict=True):
        halves[half] = folder = out / digest.hexdigest()[:12] / half
        if (folder / "test" / COUNT_FILE).is_file():  # its features are known by its time
            continue
        (folder / "test").mkdir(parents=True, exist_ok=True)
        for path in Path(source).glob("*.txt"):
            shutil.copy(path, folder)
        (folder / TYPE_FILE).write_text("multilabel")
        write_shard(folder / "test" / "0.tar", ((f"{n:06d}", samples[n]) for n in sorted(part)))
        (folder / "test" / COUNT_FILE).write_text("1")
    return halves, len(samples)
