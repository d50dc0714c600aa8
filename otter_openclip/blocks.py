"""Matrices with one entry per pair of samples, visited by blocks of rows.

A B x N matrix is either kept, or computed anew at each visit, one tile of rows at a time: then nothing
of its size is ever held. What reads it does not know which.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "dense", "streaming")

# Entries of a tile: large enough for the matrix product behind it to run at full rate.
TILE_ENTRIES = {"cpu": 2**24, "cuda": 2**26}
# Entries of a block: small enough for its elementwise passes to stay in a CPU's cache.
BLOCK_ENTRIES = {"cpu": 2**20, "cuda": 2**26}
# `auto` keeps matrices that together take at most this share of the device's memory.
KEPT_SHARE = 1 / 8


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of the machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keeps_matrices(
    implementation: str, matrices: int, rows: int, columns: int, like: Tensor
) -> bool:
    """Whether ``implementation`` holds its (rows, columns) matrices, ``matrices`` of them."""
    if implementation != "auto":
        return implementation == "dense"
    size = matrices * rows * columns * like.element_size()
    return size <= KEPT_SHARE * device_memory(like.device)


def _rows(entries: dict[str, int], columns: int, device: torch.device) -> int:
    return max(1, entries.get(device.type, entries["cuda"]) // columns)


class RowTiles:
    """A (rows, columns) matrix by tiles of rows, kept or computed at each visit.

    Attributes:
        rows, columns: shape of the matrix.
        tile_rows: rows of a tile.
    """

    def __init__(
        self,
        fill: Callable[[slice, Tensor], None],
        rows: int,
        columns: int,
        like: Tensor,
        *,
        keep: bool,
    ) -> None:
        """Define the matrix; nothing is computed before the first visit.

        Args:
            fill: writes the rows of a slice into a tensor of that many rows.
            rows: B.
            columns: N.
            like: a tensor of the matrix's dtype and device.
            keep: compute the matrix once and hold it.
        """
        self.rows = rows
        self.columns = columns
        self.tile_rows = min(rows, _rows(TILE_ENTRIES, columns, like.device))
        self._fill = fill
        self._like = like
        self._keep = keep
        self._kept: Tensor | None = None

    def empty_tile(self) -> Tensor:
        """An uninitialised tensor of a tile's shape."""
        return self._like.new_empty(self.tile_rows, self.columns)

    def whole(self) -> Tensor:
        """The kept matrix."""
        if self._kept is None:
            self._kept = self._like.new_empty(self.rows, self.columns)
            self._fill(slice(0, self.rows), self._kept)
        return self._kept

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield ``(rows, tile)``; a tile that is not kept is valid until the next one."""
        kept = self.whole() if self._keep else None
        buffer = None if self._keep else self.empty_tile()
        for start in range(0, self.rows, self.tile_rows):
            part = slice(start, min(start + self.tile_rows, self.rows))
            if kept is not None:
                yield part, kept[part]
            else:
                tile = buffer[: part.stop - start]
                self._fill(part, tile)
                yield part, tile


def row_blocks(part: slice, columns: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cut a tile's rows: yields each block's rows in the matrix and in the tile."""
    step = _rows(BLOCK_ENTRIES, columns, device)
    for start in range(part.start, part.stop, step):
        stop = min(start + step, part.stop)
        yield slice(start, stop), slice(start - part.start, stop - part.start)
