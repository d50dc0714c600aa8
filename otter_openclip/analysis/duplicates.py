"""Things that come again among all pairs looked at, and whether a model knows the pairs by heart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

NEAR = 0.95  # cosine of near-duplicates
_ROWS = 1024  # of the N x N matrices at once


def own_is_nearest(images: Tensor, texts: Tensor) -> float:
    """The share of captions whose own picture is the first of all, of unit-norm features (N, D)."""
    hits = 0
    for start, rows in _chunks(texts):
        nearest = (rows @ images.T).argmax(dim=1)
        hits += int((nearest == torch.arange(start, start + len(rows))).sum())
    return hits / len(texts)


def _chunks(features: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(features), _ROWS):
        yield start, features[start : start + _ROWS]


class Duplicates(NamedTuple):
    """Things that come again: ``groups`` of equal ones, largest first, and the nearest of others."""

    groups: list[list[int]]
    pairs: list[tuple[float, int, int]]  # cosine, two numbers; nearest first
    equal_share: float  # of all, those that another equals
    near_share: float  # of all, those that another unequal one is nearer to than NEAR


def duplicates(features: Tensor, names: Sequence[Any], most: int) -> Duplicates:
    """Duplicates among unit-norm ``features`` (N, D); those of equal ``names`` are equal.

    At most ``most`` groups and pairs are given; the shares are of all N.
    """
    members: dict[Any, list[int]] = {}
    for number, name in enumerate(names):
        members.setdefault(name, []).append(number)
    groups = sorted((g for g in members.values() if len(g) > 1), key=len, reverse=True)
    numbers = {name: number for number, name in enumerate(members)}
    label = torch.tensor([numbers[name] for name in names])
    near = torch.zeros(len(names), dtype=torch.bool)
    pairs: list[tuple[float, int, int]] = []
    for start, rows in _chunks(features):
        similar = rows @ features.T
        similar[label[start : start + len(rows), None] == label] = -1
        near[start : start + len(rows)] = similar.amax(dim=1) >= NEAR
        similar.tril_(start)  # each pair once
        values, places = similar.flatten().topk(min(most, similar.numel()))
        pairs += [
            (value, start + place // len(names), place % len(names))
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
            if value >= NEAR
        ]
    return Duplicates(
        groups[:most],
        sorted(pairs, reverse=True)[:most],
        sum(map(len, groups)) / len(names),
        float(near.float().mean()),
    )
