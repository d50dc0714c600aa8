"""Make an epoch's data depend on (seed, epoch, rank, worker) only, so that resume is exact.

Stock open_clip_train cannot repeat an epoch: webdataset's shuffle seeds itself from the clock and the
process id, persistent workers carry their random state from one epoch to the next, and csv order
follows the global generator.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from open_clip_train.data import DataInfo, ResampledShards2, SharedEpoch
from torch.utils.data import get_worker_info
from webdataset.filters import _shuffle


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from whole numbers; different numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_process(*parts: int) -> None:
    """Seed torch (all devices), numpy and random from ``parts``."""
    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _worker_id() -> int:
    info = get_worker_info()
    return 0 if info is None else info.id


class _SeedPass:
    """Pipeline stage that reseeds a worker before each pass over its shards."""

    def __init__(self, shared_epoch: SharedEpoch, seed: int, rank: int, rng: random.Random) -> None:
        self.shared_epoch = shared_epoch
        self.seed = seed
        self.rank = rank
        self.rng = rng
        self.epoch = -1
        self.passes = 0

    def __call__(self, source: Iterator[Any]) -> Iterator[Any]:
        epoch = self.shared_epoch.get_value()
        # An epoch longer than the shards passes over them again, in another order.
        self.passes = self.passes + 1 if epoch == self.epoch else 0
        self.epoch = epoch
        parts = (self.seed, self.rank, _worker_id(), epoch, self.passes)
        self.rng.seed(derive_seed(*parts))
        if get_worker_info() is not None:
            seed_process(*parts)
        return source


def _worker_seed(seed: int, rank: int) -> int:
    """Seed of open_clip's resampled shard list, a different one on each rank and worker."""
    return derive_seed(seed, rank, _worker_id())


def make_repeatable(data: dict[str, DataInfo], *, seed: int, rank: int) -> None:
    """Take chance out of ``get_data``'s training loader, in place; csv data need nothing here."""
    train = data.get("train")
    if train is None or train.shared_epoch is None:
        return
    loader = train.dataloader.pipeline[0]
    # The loader draws its workers' seeds when it starts them, in a process's first epoch only: from a
    # generator of its own, or dropout would differ after a resume.
    loader.generator = torch.Generator().manual_seed(derive_seed(seed, rank))
    stages = loader.dataset.pipeline
    (shuffle,) = (stage for stage in stages if getattr(stage, "f", None) is _shuffle)
    shuffle.kw["rng"] = rng = random.Random()
    if isinstance(stages[0], ResampledShards2):
        stages[0].worker_seed = functools.partial(_worker_seed, seed, rank)
    stages.insert(1, _SeedPass(train.shared_epoch, seed, rank, rng))
