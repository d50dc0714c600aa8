"""The course of a fit: sums, a choice, weights, the same again, what has no partner, the heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from otter_openclip.closed_form.blocks import (
    BLOCK,
    FOLDS,
    READ,
    ArrayPairs,
    Block,
    ShardPairs,
    Unpaired,
)
from otter_openclip.closed_form.choosing import CHOOSING, SETTINGS, choose
from otter_openclip.closed_form.heads import (
    Covariances,
    Heads,
    Moments,
    Setting,
    add_products,
    mirrored,
    weighted_rows,
)
from otter_openclip.closed_form.wrong_pairs import MOST_WRONG, WrongPairs, histograms, similarities
from otter_openclip.transport import sinkhorn

EPSILON, ITERATIONS = 0.03, 30  # of the transport of what has no partner
FEWEST = 50  # pairs
_HELD_OUT = 2048  # pairs of a fold by which ridge and power are chosen
_ROUNDS = 2  # of weighting, and of matching what has no partner

Weigh = Callable[[Block], Tensor]


@dataclass
class Options:
    """How heads are fitted, as of ``estimator.ClosedFormHeads``.

    Attributes:
        text_mean: whether the text head takes the mean off, which some towers cannot.
    """

    weights: bool = True
    ridge: tuple[float, float] | None = None
    power: float | None = None
    embed_dim: int | None = None
    transport_pairs: bool = False
    epsilon: float = EPSILON
    text_mean: bool = True

    def settings(self) -> list[Setting]:
        """Those among which is chosen."""
        fixed = {"ridge_images": None, "ridge_texts": None, "power": self.power}
        if self.ridge is not None:
            fixed["ridge_images"], fixed["ridge_texts"] = self.ridge
        fixed = {name: value for name, value in fixed.items() if value is not None}
        return sorted({setting._replace(**fixed) for setting in SETTINGS})


class Statistics(NamedTuple):
    """What was chosen and found.

    Attributes:
        setting: ridges and power.
        logit_scale: under which held-out pairs are likeliest.
        log_likelihood: of a held-out pair, in nats, both ways together.
        wrong: which pairs look wrong; None without weights.
        rank: directions that both towers have.
        pairs: that could be used.
    """

    setting: Setting
    logit_scale: float
    log_likelihood: float
    wrong: WrongPairs | None
    rank: int
    pairs: int


class Fit:
    """The course of one fit over ``pairs``: sums, a choice, weights, the same again, the heads."""

    def __init__(self, pairs: ArrayPairs | ShardPairs, options: Options) -> None:
        self.pairs, self.options = pairs, options
        self._held_out: list[Block] = []
        self.fold_heads: list[Heads] = []
        self.wrong: WrongPairs | None = None
        self.setting = self.scale = self.likelihood = None

    def run(self, unpaired: Unpaired | None = None) -> tuple[Heads, Statistics]:
        """The heads; ``unpaired`` are images and texts to be matched.

        Raises:
            ValueError: with too few pairs, constant features, hardly a right pair, or a width above the
                rank.
        """
        self._hold_out()
        folds = self._moments(None)
        self._choose(folds)
        for number in range(_ROUNDS if self.options.weights else 0):
            self._find_wrong(folds)
            folds = self._moments(self.weights)
            if number == 0:
                self._choose(folds)
        self.covariances = self._covariances(reduce(add, folds))
        rank = self.covariances.rank()
        if (self.options.embed_dim or 1) > rank:
            raise ValueError(
                f"embed_dim is {self.options.embed_dim}, but the features have {rank} directions; "
                f"use at most {rank}"
            )
        self._width = self.options.embed_dim or rank
        self._match(folds, unpaired)
        chosen = (self.setting, self.scale, self.likelihood)
        return self.heads(self.setting), Statistics(*chosen, self.wrong, rank, self._usable)

    def heads(self, setting: Setting) -> Heads:
        """After ``run``: the heads under any ``setting``."""
        return self.covariances.heads(setting, self._width)

    def likeliest(self, settings: Sequence[Setting]) -> tuple[Setting, float, float]:
        """After ``run``: as of ``choosing.choose`` among ``settings``."""
        return choose(*self._judged, settings)

    def chances(self, block: Block) -> Tensor:
        """(n,) of a block's pairs: how likely they are right."""
        if self.wrong is None:
            return torch.ones_like(block.weights)
        return self.wrong.weights(similarities(self.fold_heads, block)[0])

    def weights(self, block: Block) -> Tensor:
        """(n,) of a block's pairs: how likely they are right, times the user's weights."""
        return block.weights * self.chances(block)

    def _covariances(self, moments: Moments) -> Covariances:
        return moments.covariances(text_mean=self.options.text_mean)

    def _moments(self, weigh: Weigh | None) -> list[Moments]:
        """Of each fold."""
        size, device = 1 + sum(self.pairs.widths), self.pairs.device
        sums = torch.zeros(FOLDS, size, size, dtype=torch.float64, device=device)
        buffer = sums.new_empty(READ, size)  # memory that is new for each block is slow
        for block in self.pairs.blocks("Sums" if weigh is None else "Weighted sums"):
            weights = block.weights if weigh is None else weigh(block)
            order = block.folds.argsort()
            rows = buffer[: len(order)]
            weighted_rows(block.images[order], block.texts[order], weights[order], rows)
            counts = block.folds.bincount(minlength=FOLDS).tolist()
            for fold, part in enumerate(rows.split(counts)):
                add_products(sums[fold], part)
        sums = self.pairs.sum_over_ranks(sums)
        return [Moments(mirrored(each), self.pairs.widths[0]) for each in sums]

    def _hold_out(self) -> None:
        """Keep some pairs of each fold, drawn by their features: the same ones on any ranks."""
        share = min(1.0, FOLDS * _HELD_OUT / max(self.pairs.count, 1))
        parts, usable = [self.pairs.no_pairs()], torch.zeros(1, dtype=torch.int64)
        for block in self.pairs.blocks("Reading"):
            usable += len(block.images)
            drawn = (block.image_keys & 0xFFFFFF) < share * 2**24
            parts.append(block[drawn.nonzero()[:, 0]])
        self._usable = int(self.pairs.sum_over_ranks(usable))
        fields = ("images", "texts", "weights", "places")
        columns = [torch.cat([getattr(part, name) for part in parts]) for name in fields]
        block = Block(*(self.pairs.gather_from_ranks(column) for column in columns))
        block = block[block.image_keys.argsort(stable=True)]
        distinct = len(block.image_keys.unique()), len(block.text_keys.unique())
        if len(block.images) < FEWEST or min(distinct) < 2 * FOLDS:
            raise ValueError(
                f"{len(block.images)} pairs with {distinct[0]} pictures and {distinct[1]} captions are "
                f"too few to fit heads to: at least {FEWEST} pairs that differ are needed"
            )
        folds = range(FOLDS)
        self._held_out = [block[(block.folds == fold).nonzero()[:, 0]] for fold in folds]

    def _choose(self, folds: list[Moments], matched: Covariances | None = None) -> None:
        total, held_out = reduce(add, folds), self._held_out[:CHOOSING]
        left_out = [self._covariances(total - fold) for fold in folds[:CHOOSING]]
        if matched is not None:
            left_out = [each.halfway(matched) for each in left_out]
        self._judged = left_out, held_out, [self.weights(block) for block in held_out]
        self.setting, self.scale, self.likelihood = self.likeliest(self.options.settings())

    def _find_wrong(self, folds: list[Moments]) -> None:
        """Judge each pair by heads that were fitted without its fold."""
        total = reduce(add, folds)
        self.fold_heads = [self._covariances(total - fold).heads(self.setting) for fold in folds]
        none = histograms(self.fold_heads, self.pairs.no_pairs())
        counts = sum((histograms(self.fold_heads, b) for b in self.pairs.blocks("Judging")), none)
        counts = self.pairs.sum_over_ranks(counts)
        self.wrong = WrongPairs.estimate(counts, self._usable, self.wrong)
        if self.wrong.share > MOST_WRONG:
            raise ValueError(
                f"{self.wrong.share:.0%} of the pairs look wrong: pictures and captions have hardly "
                "anything to do with each other under these towers; look at some pairs, or fit "
                "without weights"
            )

    def _match(self, folds: list[Moments], unpaired: Unpaired | None) -> None:
        """Let the covariances be the mean of the pairs' and of what transport puts together; twice."""
        of_pairs, pairs = self.covariances, self.pairs
        for _ in range(_ROUNDS):
            matched = []
            if unpaired is not None:
                batches = unpaired.batches(pairs.rank, pairs.world_size)
                matched.append(self._moments_of_plans(batches, paired=False))
                # With more to go by smaller ridges are better. The pairs' own matchings would mislead
                # here: the held-out pairs are among them.
                self._choose(folds, self._covariances(matched[0]))
            if self.options.transport_pairs:
                matched.append(self._moments_of_plans(self._own(), paired=True))
            if matched:
                self.covariances = of_pairs.halfway(self._covariances(reduce(add, matched)))

    def _own(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The pairs in batches that are matched at once."""
        for block in self.pairs.blocks("Matching"):
            for images, texts in zip(
                block.images.split(BLOCK), block.texts.split(BLOCK), strict=True
            ):
                if len(images) > 1:
                    yield images, texts

    def _moments_of_plans(
        self, batches: Iterable[tuple[Tensor, Tensor]], *, paired: bool
    ) -> Moments:
        """Of what transport puts together, each batch's mass 1; no ``paired`` row with its own text."""
        heads = self.heads(self.setting)
        size = 1 + sum(self.pairs.widths)
        sums = torch.zeros(size, size, dtype=torch.float64, device=self.pairs.device)
        for images, texts in batches:
            cosines = heads.images(images) @ heads.texts(texts).T
            if paired:
                cosines.fill_diagonal_(-torch.inf)
            plan = sinkhorn(-cosines, self.options.epsilon, ITERATIONS)
            sums += Moments.matched(images, texts, plan).sums
        return Moments(self.pairs.sum_over_ranks(sums), self.pairs.widths[0])
