"""Matrices with one entry per pair of samples, visited by tiles of rows.

A B x N matrix is either kept, or computed anew at each visit, one tile at a time: then nothing of its
size is ever held. What reads it does not know which.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

# Entries of a tile: few enough for a CPU's cache; and rows: enough for the matrix products with it.
TILE_ENTRIES, TILE_ROWS = {"cpu": 2**20, "cuda": 2**26}, 128
# Rows of gradient that are multiplied at once: each product rewrites all columns' gradient.
PRODUCT_ROWS = 512
# `auto` keeps matrices that together take at most this share of the device's memory.
KEPT_SHARE = 1 / 8
# Where Linux says how much memory a container may take: control groups, version 2 and 1.
CONTAINER_LIMITS = [
    Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory/memory.limit_in_bytes")
]


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU; else of the machine, or of the container if that is less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in CONTAINER_LIMITS:
        if file.exists() and (limit := file.read_text(encoding="utf-8").strip()).isdecimal():
            return min(machine, int(limit))
    return machine


def keeps_matrices(impl: str, entries: int, like: Tensor) -> bool:
    """Whether ``impl`` holds its matrices, which have so many entries together."""
    if impl != "auto":
        return impl == "dense"
    return entries * like.element_size() <= KEPT_SHARE * device_memory(like.device)


Write = Callable[[slice, Tensor], object]


def _parts(rows: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class RowTiles:
    """A matrix by tiles of rows; ``rows``, ``columns`` are its shape, ``like`` its dtype and device."""

    def __init__(self, write: Write, shape: tuple[int, int], like: Tensor, keep: bool) -> None:
        """``write(rows, out)`` puts the rows of a slice into ``out``; ``keep`` holds the matrix."""
        (self.rows, self.columns), self.like = shape, like
        entries = TILE_ENTRIES.get(like.device.type, TILE_ENTRIES["cuda"])
        self._tile_rows = min(self.rows, max(TILE_ROWS, entries // self.columns))
        self._write, self._keep = write, keep
        self._kept: Tensor | None = None

    def empty(self, rows: int = 0) -> Tensor:
        """An uninitialised tensor of a tile's shape, or of ``rows`` if these are more."""
        return self.like.new_empty(min(self.rows, max(self._tile_rows, rows)), self.columns)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield ``(rows, tile)``; a tile that is not kept is valid until the next one."""
        matrix = self._kept
        if self._keep and matrix is None:
            matrix = self.like.new_empty(self.rows, self.columns)
            for part in _parts(self.rows, max(self._tile_rows, PRODUCT_ROWS)):
                self._write(part, matrix[part])
            self._kept = matrix
        buffer = self.empty() if matrix is None else matrix
        for part in _parts(self.rows, self._tile_rows):
            if matrix is not None:
                yield part, matrix[part]
            else:
                self._write(part, tile := buffer[: part.stop - part.start])
                yield part, tile
