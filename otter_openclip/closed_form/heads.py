"""Heads for two frozen towers in closed form: regularised canonical correlation of their features.

With features x (width p) and y (width q) of pairs of weights w, and means and covariances under them:

    R(C, r) = C + r * (mean eigenvalue of C) * I
    U diag(s) V^T = R(Cxx, r_x)^(-1/2) Cxy R(Cyy, r_y)^(-1/2)
    image head: x -> (x - mean x) R(Cxx, r_x)^(-1/2) U s^power, of unit length; the text head likewise

A relative of it is CSA (Li et al. 2024). All that is known of pairs is one matrix of sums, so that any
number of them takes the memory of one block, ranks add up theirs, and a fold is left out by subtraction.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.linalg.blas import dsyrk
from torch import Tensor

_RANK = 1e-10  # smaller eigenvalues, relative to the largest, are rounding
_TINY = 1e-30  # in place of a zero that is divided by
_SMALL = 1e-8  # smaller correlations, relative to the largest, are rounding


class Setting(NamedTuple):
    """What is chosen: the two ridges, relative to the mean eigenvalue, and the correlations' power."""

    ridge_images: float
    ridge_texts: float
    power: float = 1.0


class Moments:
    """Weighted sums over pairs: of 1, x, y and of their products, (1 + p + q) squared in float64."""

    def __init__(self, sums: Tensor, width: int) -> None:
        """``width`` is p, that of the image features."""
        self.sums, self.width = sums, width

    @classmethod
    def matched(cls, images: Tensor, texts: Tensor, plan: Tensor) -> Moments:
        """Of all pairs of images (m, p) and texts (n, q), with the weights ``plan`` (m, n)."""
        x, y = (F.pad(side.double(), (1, 0), value=1.0) for side in (images, texts))
        plan, texts_only = plan.double(), slice(images.shape[1] + 1, None)
        images_only = slice(1, images.shape[1] + 1)
        of_images, of_texts = (plan.sum(1) * x.T) @ x, (plan.sum(0) * y.T) @ y
        sums = torch.block_diag(of_images, of_texts[1:, 1:])
        sums[0, texts_only] = sums[texts_only, 0] = of_texts[0, 1:]
        cross = x[:, 1:].T @ plan @ y[:, 1:]
        sums[images_only, texts_only], sums[texts_only, images_only] = cross, cross.T
        return cls(sums, images.shape[1])

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.sums + other.sums, self.width)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.sums - other.sums, self.width)

    def covariances(self, *, text_mean: bool = True) -> Covariances:
        """Means and covariances; with ``text_mean=False`` texts are taken around 0."""
        mean = self.sums[0, 1:] / self.sums[0, 0]
        center = mean.clone()
        if not text_mean:
            center[self.width :] = 0
        second = self.sums[1:, 1:] / self.sums[0, 0]
        # With one of the two centres at its mean the product of means is the right one to take off.
        covariance = second - torch.outer(mean, mean)
        texts = slice(self.width, None)
        if not text_mean:
            covariance[texts, texts] = second[texts, texts]
        return Covariances(center, covariance, self.width)


def weighted_rows(images: Tensor, texts: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Write (1, x, y) of each pair, times the root of its weight, into ``rows`` (n, 1 + p + q)."""
    width = images.shape[1]
    rows[:, 0], rows[:, 1 : width + 1], rows[:, width + 1 :] = 1.0, images, texts
    rows *= weights.double().sqrt()[:, None]
    return rows


def add_products(sums: Tensor, rows: Tensor) -> None:
    """Add ``rows.T @ rows`` to ``sums``, of which only the lower triangle is kept."""
    if rows.device.type != "cpu":
        sums.addmm_(rows.T, rows)
    elif len(rows):
        # To BLAS, which counts by columns, the lower triangle is the upper one.
        dsyrk(1.0, rows.numpy().T, beta=1.0, c=sums.numpy().T, overwrite_c=1)


def mirrored(sums: Tensor) -> Tensor:
    """``sums``, whose lower triangle is now its upper one, too."""
    sums.tril_()
    return sums.add_(sums.tril(-1).mT)


@dataclass(frozen=True, eq=False)
class Covariances:
    """Centres (p + q,) and covariances (p + q, p + q) of both sides, images first."""

    mean: Tensor
    matrix: Tensor
    width: int
    _regressions: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def halfway(self, other: Covariances) -> Covariances:
        """The mean of both matrices; the centres stay."""
        return Covariances(self.mean, (self.matrix + other.matrix) / 2, self.width)

    def rank(self) -> int:
        """How many directions both sides have: the widest embedding."""
        sides = self.matrix[: self.width, : self.width], self.matrix[self.width :, self.width :]
        spectra = [torch.linalg.eigvalsh(side) for side in sides]
        return min(int((values > _RANK * values[-1]).sum()) for values in spectra)

    def directions(self, ridge_images: float, ridge_texts: float) -> Directions:
        """The canonical directions under two ridges.

        With the regression B = R(Cxx)^(-1) Cxy of texts on images and a root L of R(Cyy), the right
        singular vectors V are the eigenvectors of L^(-1) Cyx B L^(-T), as wide as the texts;
        directions are L^(-T) V of texts and, times the correlations, B L^(-T) V of images.

        Raises: ValueError if a covariance has no inverse, for which its ridge is too small.
        """
        p = self.width
        try:
            if ridge_images not in self._regressions:
                root = _root(self.matrix[:p, :p], ridge_images)
                regression = torch.cholesky_solve(self.matrix[:p, p:], root)
                self._regressions[ridge_images] = (regression, self.matrix[p:, :p] @ regression)
            root = _root(self.matrix[p:, p:], ridge_texts)
        except torch.linalg.LinAlgError:
            raise ValueError(
                f"with the ridges {ridge_images:g} and {ridge_texts:g} a covariance has no inverse: "
                "features are constant or too many for the pairs; use ridges above 0"
            ) from None
        regression, explained = self._regressions[ridge_images]
        inner = torch.linalg.solve_triangular(root, explained, upper=False)
        inner = torch.linalg.solve_triangular(root, inner.T, upper=False)
        values, vectors = torch.linalg.eigh(inner)
        wide = min(p, len(root))
        correlations = values.flip(0)[:wide].clamp(min=_TINY).sqrt()
        vectors = vectors.flip(1)[:, :wide]
        texts = torch.linalg.solve_triangular(root.T, vectors, upper=True)
        return Directions(self.mean, regression @ texts, texts, correlations)

    def heads(self, setting: Setting, width: int | None = None) -> Heads:
        """The heads under ``setting``, with embeddings of ``width``, by default as wide as can be."""
        directions = self.directions(setting.ridge_images, setting.ridge_texts)
        return directions.heads(setting.power, width)


@dataclass(frozen=True, eq=False)
class Directions:
    """Canonical directions of both sides, and their correlations, falling."""

    mean: Tensor
    images: Tensor  # (p, k), times the correlations
    texts: Tensor  # (q, k)
    correlations: Tensor  # (k,)

    def heads(self, power: float, width: int | None = None) -> Heads:
        """The heads with embeddings of ``width``, at most and by default k."""
        of_images, of_texts = self.scales(power)
        means = self.mean.split([len(self.images), len(self.texts)])
        weights = (self.images * of_images)[:, :width], (self.texts * of_texts)[:, :width]
        return Heads(*(x.float() for x in (*means, *weights, self.correlations[:width])))

    def projected(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, p) and (n, q) along the directions, (n, k) each in float32."""
        means = self.mean.split([len(self.images), len(self.texts)])
        return projected(images, means[0], self.images), projected(texts, means[1], self.texts)

    def scales(self, power: float) -> tuple[Tensor, Tensor]:
        """What columns of both sides are multiplied by, (k,) each."""
        relative = (self.correlations / self.correlations[0]).clamp(min=_SMALL)
        return relative ** (power - 1), relative**power


def _root(covariance: Tensor, ridge: float) -> Tensor:
    """The lower triangular root of R(covariance, ridge)."""
    shrunk = covariance.clone()
    shrunk.diagonal().add_(ridge * covariance.diagonal().mean())
    return torch.linalg.cholesky(shrunk)


@dataclass(frozen=True, eq=False)
class Heads:
    """Two linear heads in float32: features minus ``mean``, times ``weight``, of unit length."""

    image_mean: Tensor  # (p,)
    text_mean: Tensor  # (q,)
    image_weight: Tensor  # (p, D)
    text_weight: Tensor  # (q, D)
    correlations: Tensor  # (D,) canonical, falling, in [0, 1]

    def cpu(self) -> Heads:
        """The same on the CPU, where models are written."""
        return Heads(**{each.name: getattr(self, each.name).cpu() for each in fields(self)})

    def images(self, features: Tensor) -> Tensor:
        """(n, D) unit-norm embeddings of image features (n, p)."""
        return _embedded(features, self.image_mean, self.image_weight)

    def texts(self, features: Tensor) -> Tensor:
        """(n, D) unit-norm embeddings of text features (n, q)."""
        return _embedded(features, self.text_mean, self.text_weight)


def _embedded(features: Tensor, mean: Tensor, weight: Tensor) -> Tensor:
    return F.normalize(projected(features, mean, weight), dim=1)


def projected(features: Tensor, mean: Tensor, weight: Tensor) -> Tensor:
    """(n, D) features minus their mean, times a weight, in float32."""
    return features.float() @ weight.float() - (mean @ weight).float()


def log_likelihood(images: Tensor, texts: Tensor, weights: Tensor, scales: list[float]) -> Tensor:
    """Of each text among all for its image, plus the other way round, at each of the scales.

    ``images`` and ``texts`` are (n, D) unit-norm, ``weights`` (n,) of the pairs; the mean is taken.
    """
    cosines = images @ texts.T
    totals = []
    for scale in scales:
        raised = (scale * (cosines - 1)).exp()  # at most 1: no maximum need be taken off
        ways = raised.sum(0).log() + raised.sum(1).log()
        pairs = 2 * scale * (cosines.diagonal() - 1) - ways
        totals.append((weights * pairs).sum() / weights.sum().clamp(min=_TINY))
    return torch.stack(totals).double()
