"""Pairs of features in blocks, with the folds they are left out in: of arrays, or of files of shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from otter_openclip.frozen.store import FeatureFiles, usable

BLOCK = 4096  # pairs that are matched at once
READ = 16_384  # pairs that are read at once: sums of their folds are long enough to be quick
FOLDS = 5
_KEYED = 64  # values of a row that tell it from others


@dataclass(eq=False)
class Block:
    """n pairs: features (n, p) and (n, q) in float32, and where they stand in their shard.

    Attributes:
        weights: (n,) of the user, float64.
        places: (n,) numbers within the shard, or within the arrays.
        image_keys, text_keys: (n,) int64, the same for equal features and hardly for others.
    """

    images: Tensor
    texts: Tensor
    weights: Tensor
    places: Tensor

    def __post_init__(self) -> None:
        self.image_keys, self.text_keys = _keys(self.images), _keys(self.texts)

    @property
    def folds(self) -> Tensor:
        """(n,) Pairs of one picture are in one fold, so that none is judged by its twin."""
        return (self.image_keys >> 32) % FOLDS

    def __getitem__(self, rows: Tensor) -> Block:
        return Block(self.images[rows], self.texts[rows], self.weights[rows], self.places[rows])


def _keys(features: Tensor) -> Tensor:
    """A 64-bit hash of some values of each row."""
    step = max(1, features.shape[1] // _KEYED)
    bits = features[:, ::step].contiguous().float().view(torch.int32).long()
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(2**62, (bits.shape[1],), generator=generator).to(bits.device) * 2 + 1
    keys = (bits * odd).sum(dim=1)  # both wrap around
    return (keys ^ (keys >> 29)) * odd[0]


class _Pairs:
    """What holds of pairs wherever they lie."""

    device: torch.device
    widths: tuple[int, int]
    rank, world_size = 0, 1

    def no_pairs(self) -> Block:
        """A block of none, for a rank that has no shard."""
        sides = (torch.zeros(0, width, device=self.device) for width in self.widths)
        none = torch.zeros(0, dtype=torch.float64, device=self.device)
        return Block(*sides, none, none.long())

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of all ranks' values."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def gather_from_ranks(self, value: Tensor) -> Tensor:
        """The (n, ...) values of all ranks, one after the other."""
        if self.world_size == 1:
            return value
        parts = [None] * self.world_size
        dist.all_gather_object(parts, value.cpu())
        return torch.cat(parts).to(value.device)


class ArrayPairs(_Pairs):
    """Pairs in memory, of one process."""

    def __init__(self, images: Tensor, texts: Tensor, weights: Tensor) -> None:
        self.images, self.texts, self.weights = images, texts, weights
        self.count, self.device = len(images), images.device
        self.widths = images.shape[1], texts.shape[1]

    def blocks(self, what: str) -> Iterator[Block]:
        """All pairs."""
        places = torch.arange(self.count, device=self.device).split(READ)
        for rows in places:
            yield Block(self.images[rows], self.texts[rows], self.weights[rows], rows)


class ShardPairs(_Pairs):
    """This rank's share of pairs whose features lie in files beside shards."""

    def __init__(
        self,
        images: FeatureFiles,
        texts: FeatureFiles,
        shards: Sequence[str],
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """All files must be there; ValueError if one is damaged."""
        self.files, self.shards, self.device = (images, texts), list(shards), device
        self.rank, self.world_size = rank, world_size
        self._finite: set[str] = set()  # shards that were looked at
        headers = [(images.read(shard).shape, texts.read(shard).shape) for shard in shards]
        self.count = sum(shape[0] for shape, _ in headers)
        # An empty shard's file knows no width.
        self.widths = tuple(max(shape[2] for shape in side) for side in zip(*headers, strict=True))

    def blocks(self, what: str) -> Iterator[Block]:
        """The usable pairs of this rank's shards; ``what`` is the bar's name."""
        shards = self.shards[self.rank :: self.world_size]
        for shard in tqdm(shards, desc=what, unit="shard", disable=self.rank > 0):
            yield from self.of_shard(shard)

    def of_shard(self, shard: str) -> Iterator[Block]:
        """The usable pairs of a shard."""
        rows = [files.read(shard) for files in self.files]
        for begin in range(0, len(rows[0]), READ):
            sides = [side[begin : begin + READ] for side in rows]
            places = torch.from_numpy(usable(sides[0]) & usable(sides[1])).nonzero()[:, 0]
            if len(places):
                features = [
                    torch.from_numpy(side[:, 0][places.numpy()]).to(self.device).float()
                    for side in sides
                ]
                if shard not in self._finite and not all(
                    value.isfinite() for side in features for value in side.aminmax()
                ):
                    path = self.files[0].path(shard)
                    raise ValueError(
                        f"{path} or its like of the texts has features that are not finite; remove "
                        "both to have them made again"
                    )
                weights = torch.ones(len(places), dtype=torch.float64, device=self.device)
                yield Block(*features, weights, places + begin)
        self._finite.add(shard)


class Unpaired:
    """Images and texts that belong to no pair, of which transport matches batches."""

    def __init__(self, images: Tensor | Rows, texts: Tensor | Rows) -> None:
        """Rows (m, p) and (n, q) of features."""
        self.images, self.texts = images, texts

    def batches(self, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A rank's share of batches of both sides, the longer of them by :data:`BLOCK` rows at most.

        There are at most as many as either side has rows.
        """
        sides = self.images, self.texts
        count = min(-(-max(map(len, sides)) // BLOCK), *map(len, sides))
        for number in range(rank, count, world_size):
            images, texts = (
                side[len(side) * number // count : len(side) * (number + 1) // count]
                for side in sides
            )
            if len(images) and len(texts):
                yield images, texts


class Rows:
    """Rows of features in several memory-mapped arrays, read as they are asked for."""

    def __init__(self, arrays: Sequence[np.ndarray], device: torch.device) -> None:
        """Arrays (n, 1, width), of which unusable rows are left out when they are read."""
        self.arrays, self.device = [each for each in arrays if len(each)], device
        self.starts = np.cumsum([0, *map(len, self.arrays)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: slice) -> Tensor:
        parts = []
        for start, array in zip(self.starts, self.arrays, strict=False):
            part = array[max(rows.start - start, 0) : max(rows.stop - start, 0)]
            parts.append(part[usable(part)][:, 0])
        return torch.from_numpy(np.concatenate(parts)).to(self.device).float()
