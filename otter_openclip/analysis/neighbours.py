"""What is near what among all pairs looked at: where a caption's own picture ranks, and duplicates.

If a caption belongs to a picture drawn by lot, its own picture's rank among all is uniform, whatever the
model. So the share of own pictures that end in the far 30%, divided by 0.3, is an upper estimate of the
share of captions that fit their picture no better than chance (Storey's estimate of true nulls).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FAR = 0.7  # ranks beyond are taken for chance's
NEAR = 0.95  # cosine of near-duplicates
BINS = 20
_NEIGHBOURS = 20
_ROWS = 1024  # of the N x N matrices at once


class Ranking(NamedTuple):
    """Of N captions: how their own picture does against the others' pictures."""

    rank: Tensor  # (N,) share of the other pictures that are nearer than its own, in [0, 1]
    own_score: Tensor  # (N,) of its own picture
    best_score: Tensor  # (N,) of the nearest other picture
    best: Tensor  # (N,) which one that is

    def statistics(self) -> dict[str, Any]:
        """The share at chance with its standard error, and the ranks' histogram."""
        far, count = float((self.rank > FAR).float().mean()), len(self.rank)
        error = (max(far, 1 / count) * (1 - far) / count) ** 0.5
        bins = np.histogram(self.rank.numpy(), BINS, (0, 1))[0]
        return {
            "at_chance": min(far / (1 - FAR), 1.0),
            "standard_error": error / (1 - FAR),
            "beats_a_random_picture": float(1 - self.rank.mean()),
            "own_is_nearest": float((self.own_score > self.best_score).float().mean()),
            "histogram": bins.tolist(),
        }


def by_similarity(images: Tensor, texts: Tensor) -> Ranking:
    """Captions' own pictures by the model's similarity, of unit-norm features (N, D)."""
    return _rank(texts, images)


def by_neighbours(images: Tensor, texts: Tensor) -> Ranking:
    """Captions' own pictures by their similarity to the pictures of the most similar other captions.

    This compares pictures with pictures and captions with captions, so that it works where the model's
    two towers know nothing of each other yet. Pictures near to all others are not preferred: their mean
    is taken off. With few pairs fewer neighbours are used.
    """
    count = min(_NEIGHBOURS, max(1, (len(texts) - 1) // 4))
    expected = torch.empty_like(images)
    for start, rows in _chunks(texts):
        similar = rows @ texts.T
        _diagonal(similar, start).fill_(-torch.inf)
        nearest = similar.topk(count, dim=1).indices
        expected[start : start + len(rows)] = images[nearest].mean(dim=1)
    return _rank(expected - expected.mean(dim=0), images)


def _rank(captions: Tensor, pictures: Tensor) -> Ranking:
    parts = []
    for start, rows in _chunks(captions):
        scores = rows @ pictures.T
        own_score = _diagonal(scores, start).clone()
        _diagonal(scores, start).fill_(-torch.inf)
        nearer = (scores > own_score[:, None]).sum(dim=1).float()
        nearer += (scores == own_score[:, None]).sum(dim=1) / 2
        parts.append((nearer / (len(pictures) - 1), own_score, *scores.max(dim=1)))
    return Ranking(*map(torch.cat, zip(*parts, strict=True)))


def _chunks(features: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(features), _ROWS):
        yield start, features[start : start + _ROWS]


def _diagonal(scores: Tensor, start: int) -> Tensor:
    """A view of the entries (i, start + i)."""
    return scores[:, start : start + len(scores)].diagonal()


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
