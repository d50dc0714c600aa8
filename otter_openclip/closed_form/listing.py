"""The pairs that look wrong, where they lie and what fits better; and each pair's weight in a file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from otter_openclip.closed_form.blocks import ShardPairs
from otter_openclip.closed_form.course import Fit
from otter_openclip.closed_form.heads import Heads
from otter_openclip.closed_form.wrong_pairs import similarities
from otter_openclip.frozen.store import FeatureFiles
from otter_openclip.shards import read

WRONG = 0.5  # pairs of a smaller weight are likelier wrong than right
BETTER = 3  # captions that fit a picture better
_CAPTIONS = 65_536  # among which they are sought
_ROUNDING = 1e-5  # of a similarity
Place = tuple[str, int]  # a shard, and a sample's number in it
Files = dict[str, bytes]


class WrongPair(NamedTuple):
    """A pair that looks wrong: where it lies, how likely it is right, and its own similarity."""

    place: Place
    key: str
    weight: float
    similarity: float


def judge_shards(fit: Fit, pairs: ShardPairs, folder: str) -> tuple[Files, list[WrongPair]]:
    """Files of weights by name below ``folder``, and the wrong pairs, most certain first.

    A file has a row for each sample of its shard, NaN where it has no weight, and is called as the
    shard's features are. Of several ranks each judges its shards, and all have the whole.
    """
    files, wrong = {}, []
    for shard in pairs.shards[pairs.rank :: pairs.world_size]:
        weights = np.full((len(pairs.files[0].read(shard)), 1, 1), np.nan, np.float32)
        doubtful: dict[int, tuple[float, float]] = {}
        for block in pairs.of_shard(shard):
            own = similarities(fit.fold_heads, block)[0]
            values = fit.wrong.weights(own)
            places = block.places.tolist()
            weights[places, 0, 0] = values.cpu().numpy()
            listed = zip(places, values.tolist(), own.tolist(), strict=True)
            doubtful |= {place: each for place, *each in listed if each[0] < WRONG}
        np.save(buffer := io.BytesIO(), weights)
        files[f"{folder}/{pairs.files[0].path(shard).name}"] = buffer.getvalue()
        if doubtful:
            for place, (key, _) in enumerate(read.samples(shard, contents=False)):
                if place in doubtful:
                    wrong.append(WrongPair((shard, place), key, *doubtful[place]))
    if pairs.world_size > 1:
        everyone: list[Any] = [None] * pairs.world_size
        dist.all_gather_object(everyone, (files, wrong))
        files = {name: file for each, _ in everyone for name, file in each.items()}
        wrong = [pair for _, each in everyone for pair in each]
    return files, sorted(wrong, key=lambda pair: (pair.weight, pair.similarity, pair.place))


def weights_of(path: str) -> FeatureFiles:
    """The weights that belong to a fit.json; ValueError if it has none."""
    try:
        folder = json.loads(Path(path).read_text(encoding="utf-8"))["pair_weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--pair-weights {path} has no weights of pairs ({error}); give the fit.json of "
            "otter-openclip fit, without --no-weights"
        ) from error
    return FeatureFiles(Path(path).parent / folder)


def better_captions(pairs: ShardPairs, heads: Heads, wrong: list[WrongPair]) -> list[list[Place]]:
    """For each of the ``wrong`` pairs places of captions that fit its picture better than its own."""
    if not wrong:
        return []
    sides = (torch.cat([_row(files, *pair.place) for pair in wrong]) for files in pairs.files)
    embedded, texts = heads.images(next(sides)), heads.texts(next(sides))
    own = (embedded * texts).sum(dim=1)
    scores = torch.zeros(len(wrong), 0)
    where: list[Place] = []
    for shard in pairs.shards:
        if len(where) >= _CAPTIONS:
            break
        for block in pairs.of_shard(shard):
            scores = torch.cat([scores, embedded @ heads.texts(block.texts.cpu()).T], dim=1)
            where += [(shard, place) for place in block.places.tolist()]
    best = scores.topk(min(BETTER, scores.shape[1]), dim=1)
    better = (best.values > own[:, None] + _ROUNDING).tolist()
    rows = zip(best.indices.tolist(), better, strict=True)
    return [[where[n] for n, is_better in zip(*row, strict=True) if is_better] for row in rows]


def _row(files: FeatureFiles, shard: str, number: int) -> Tensor:
    return torch.from_numpy(np.array(files.read(shard)[number, :1])).float()


def contents(places: Sequence[Place]) -> Mapping[Place, Mapping[str, bytes]]:
    """The files of samples by their place; each shard is read once."""
    samples = {}
    for shard in dict.fromkeys(shard for shard, _ in places):
        numbers = {number for each, number in places if each == shard}
        for number, (_, files) in enumerate(read.samples(shard)):
            if number in numbers:
                samples[shard, number] = files
            if number >= max(numbers):
                break
    return samples
