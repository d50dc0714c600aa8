"""Features of a shard's samples in a file of their own, which is found without opening the shard.

A folder holds what one frozen tower, or the tokenizer, gives: one ``.npy`` for each shard, with a row
for each of its samples in their order. A row that begins with NaN (tokens: -1) stands for a sample that
cannot be used. A shard's file is known by its name, size and time of change: one that was written again
has features of its own. Any number of processes may read, and write, at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from otter_openclip.files import written_whole

BLOCK = 512  # rows that are read at once
# What float16 may change: a row of features, relative to its length, and cosines between rows, of which
# the root mean square counts. They are what the losses see, which then stay the same within 1e-5.
MAX_HALF_ERROR, MAX_HALF_COSINE_ERROR = 1e-3, 2.5e-5
_COMPARED = 256  # rows whose cosines are compared


class FeatureFiles:
    """The files of one tower, or of the tokenizer, in a folder."""

    def __init__(self, folder: Path) -> None:
        """Raise OSError if ``folder`` is not there and cannot be made."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def path(self, shard: str) -> Path:
        """The file that belongs to the tar ``shard``; OSError if there is no such tar."""
        status = os.stat(shard)
        return self.folder / f"{Path(shard).stem}-{status.st_size}-{status.st_mtime_ns}.npy"

    def missing(self, shards: Sequence[str]) -> list[str]:
        """Those of ``shards`` that have no file yet; one folder is listed, and no file opened."""
        names = set(os.listdir(self.folder))
        return [shard for shard in shards if self.path(shard).name not in names]

    def write(self, shard: str, rows: np.ndarray) -> None:
        """Keep the (samples, 1, width) ``rows`` of a shard, whole or not at all."""
        with written_whole(self.path(shard)) as file:
            np.save(file, rows)

    def read(self, shard: str) -> np.ndarray:
        """The rows of a shard, (samples, 1, width), memory-mapped.

        Raises: ValueError if the file is damaged.
        """
        path = self.path(shard)
        try:
            return np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); remove it to have it made again"
            ) from error

    def whole(self, shards: Iterable[str]) -> np.ndarray:
        """(samples, width) of all samples; ValueError names one that has no features."""
        parts = []
        for shard in shards:
            rows = self.read(shard)
            if missing := np.flatnonzero(~usable(rows)).tolist():
                raise ValueError(f"{shard}, sample {missing[0]}: the picture cannot be decoded")
            parts.append(rows[:, 0])
        return np.concatenate(parts)

    def rows(self, shard: str) -> Iterator[np.ndarray | None]:
        """The (width,) row of each sample in turn; None if it has none."""
        features = self.read(shard)
        for begin in range(0, len(features), BLOCK):
            block = np.array(features[begin : begin + BLOCK])
            for row, good in zip(block[:, 0], usable(block), strict=True):
                yield row.copy() if good else None


def usable(rows: np.ndarray) -> np.ndarray:
    """Whether each of the (samples, 1, width) ``rows`` can be used, (samples,) bool."""
    if not rows.size:
        return np.zeros(len(rows), bool)
    first = rows[:, 0, 0]
    return first >= 0 if first.dtype.kind == "i" else ~np.isnan(first)


def in_half(rows: np.ndarray) -> tuple[np.ndarray, str]:
    """Features in float16 where that is near enough, else as they are; and what was found, in words."""
    half = rows.astype(np.float16)
    exact, rounded = (each[usable(rows), 0].astype(np.float32) for each in (rows, half))
    if not len(exact):
        return half, "float16"
    norms = np.linalg.norm(exact, axis=1).clip(1e-30)
    distance = float((np.linalg.norm(rounded - exact, axis=1) / norms).max())
    units = [each[:_COMPARED] / norms[:_COMPARED, None] for each in (exact, rounded)]
    change = units[0] @ units[0].T - units[1] @ units[1].T
    cosines = float(np.sqrt(np.square(change).mean()))
    said = f"off by {distance:.0e}, cosines by {cosines:.0e}"
    if distance <= MAX_HALF_ERROR and cosines <= MAX_HALF_COSINE_ERROR:
        return half, f"float16: {said}"
    return rows, f"float32: in float16 they would be {said}"
