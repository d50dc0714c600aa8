"""Which pairs look wrong: a pair's own similarity against that of pictures with others' captions.

Own similarities are a mixture of wrong pairs', whose density f_0 is known from pictures and captions
that are put together at random, and of right ones'. The share of wrong ones is Storey's estimate (2002):
half of the wrong pairs are below the median of f_0, and hardly any right one. A pair of similarity c is
right with the probability 1 - share * f_0(c) / f(c), one less the local false discovery rate (Efron et
al. 2001).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.ndimage import gaussian_filter1d
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from otter_openclip.closed_form.blocks import FOLDS, Block
from otter_openclip.closed_form.heads import Heads

_BINS = 2001  # of cosines between -1 and 1
_GROUP = 32  # pairs among which captions are exchanged
_EMPTY = 1e-9  # density
FLOOR = 1e-3  # the least weight: a pair is never quite left out
MOST_WRONG = 0.9  # a larger share of wrong pairs leaves nothing to learn from


def similarities(heads: list[Heads], block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Own similarities (n,) of a block's pairs, and others' with their weights, (m,) each.

    Each fold is seen by heads that were fitted without it. Pictures with the same caption, and captions
    of the same picture, are not another's: they are as right as the pair itself.
    """
    own = torch.empty(len(block.images), device=block.images.device)
    others, weights = [], []
    for fold in range(FOLDS):
        rows = (block.folds == fold).nonzero()[:, 0]
        part = block[rows]
        images, texts = heads[fold].images(part.images), heads[fold].texts(part.texts)
        own[rows] = (images * texts).sum(dim=1)
        size = min(_GROUP, len(rows))
        if size < 2:
            continue
        whole = len(rows) // size * size
        grouped = [x[:whole].unflatten(0, (-1, size)) for x in (images, texts)]
        keys = [x[:whole].view(-1, size) for x in (part.image_keys, part.text_keys)]
        different = torch.stack([k[:, :, None] != k[:, None, :] for k in keys]).all(dim=0)
        others.append((grouped[0] @ grouped[1].mT)[different])
        weight = part.weights[:whole].view(-1, size, 1).expand(different.shape)
        weights.append(weight[different])
    if not others:
        return own, own[:0], block.weights[:0]
    return own, torch.cat(others), torch.cat(weights)


def histograms(heads: list[Heads], block: Block) -> Tensor:
    """(2, bins) float64: the pairs' own similarities of a block, and others'."""
    own, others, weights = similarities(heads, block)
    return torch.stack([_histogram(own, block.weights), _histogram(others, weights)])


def _bin(cosines: Tensor) -> Tensor:
    return ((cosines.clamp(-1, 1) + 1) * ((_BINS - 1) / 2)).round().long()


def _histogram(cosines: Tensor, weights: Tensor) -> Tensor:
    # Of nothing it would be in float32.
    return torch.bincount(_bin(cosines), weights.double(), minlength=_BINS).double()


@dataclass(frozen=True, eq=False)
class WrongPairs:
    """The estimate.

    Attributes:
        share: of the pairs, that are wrong.
        error: its standard error.
        probability: (bins,) of cosines, that such a pair is right; it does not fall.
        histograms: (2, bins) densities of the pairs' own similarities, and of others'.
    """

    share: float
    error: float
    probability: Tensor
    histograms: Tensor

    @classmethod
    def estimate(
        cls, histograms: Tensor, pairs: int, before: WrongPairs | None = None
    ) -> WrongPairs:
        """From the sum of ``histograms`` over all blocks of so many ``pairs``.

        The share is that of an estimate ``before``, if there was one: heads that were fitted with its
        weights have seen, by way of them, the pairs that they now judge, and find fewer wrong ones.

        Raises:
            ValueError: if all captions, or all pictures, are equal.
        """
        totals = histograms.sum(dim=1, keepdim=True)
        if totals.min() <= 0:
            raise ValueError(
                "all pictures, or all captions, are equal: no pair can be told from another"
            )
        densities = histograms / totals
        own, others = densities.cumsum(dim=1)
        median = int((others >= 0.5).nonzero()[0])
        below = float(own[median] - densities[0, median] / 2)
        share = min(below / 0.5, 1.0)
        error = (max(below * (1 - below), 1 / pairs) / pairs) ** 0.5 / 0.5
        if before is not None:
            share, error = before.share, before.error
        smooth, null = _smoothed(densities, pairs)
        # Where there are neither pairs nor others the added density makes the ratio 1, not 0.
        probability = (1 - (share * null + _EMPTY) / (smooth + _EMPTY)).clamp(0, 1)
        # It grows with the similarity; in the tails, where pairs are few, the estimate alone does not.
        rising = isotonic_regression(
            probability.cpu().numpy(), sample_weight=smooth.cpu().numpy() + _EMPTY
        )
        return cls(share, error, torch.from_numpy(rising).to(densities.device), densities)

    def weights(self, own: Tensor) -> Tensor:
        """(n,) probabilities, in float64, that pairs of these ``own`` similarities are right."""
        return self.probability.to(own.device)[_bin(own)].clamp(min=FLOOR)


def _smoothed(densities: Tensor, pairs: int) -> Tensor:
    """Densities under a Gaussian kernel of Silverman's width for the first of them."""
    at = torch.linspace(-1, 1, _BINS, dtype=torch.float64, device=densities.device)
    mean = (densities[0] * at).sum()
    deviation = (densities[0] * (at - mean) ** 2).sum().sqrt()
    width = max(float(1.06 * deviation * pairs**-0.2), 1e-3) * (_BINS - 1) / 2
    smooth = gaussian_filter1d(densities.cpu(), width, axis=1, mode="constant", truncate=8)
    return torch.from_numpy(smooth).to(densities.device)
