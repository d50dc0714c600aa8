"""``fit_heads`` on arrays, and the same as an estimator with scikit-learn's habits."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from otter_openclip.closed_form.blocks import ArrayPairs, Unpaired
from otter_openclip.closed_form.course import EPSILON, Fit, Options, Statistics
from otter_openclip.closed_form.heads import log_likelihood
from otter_openclip.numerics import check_interval
from otter_openclip.transport import MIN_EPSILON

Array = Any  # numpy's or torch's


def fit_heads(
    image_features: Array,
    text_features: Array,
    *,
    sample_weight: Array | None = None,
    unpaired_images: Array | None = None,
    unpaired_texts: Array | None = None,
    **options: Any,
) -> tuple[ClosedFormHeads, Array, Statistics]:
    """Linear heads for the features of N pairs, and how likely each of the pairs is right.

    Args:
        image_features: (N, p) floats, of a frozen tower.
        text_features: (N, q) floats.
        sample_weight: (N,) at least 0; a pair of weight 2 counts as two.
        unpaired_images: (m, p) of images without captions, which transport matches with
            ``unpaired_texts`` (n, q).
        unpaired_texts: both are given, or none.
        **options: of ``ClosedFormHeads``.

    Returns:
        The fitted heads; weights (N,) in (0, 1], how likely a pair is right; and what was chosen.

    Raises:
        ValueError: naming features that do not fit each other or are not finite; with fewer than 50
            pairs that differ, hardly a right pair, or an ``embed_dim`` above the features' rank.
    """
    model = ClosedFormHeads(**options)
    model.fit(image_features, text_features, sample_weight, unpaired_images, unpaired_texts)
    return model, model.pair_weights_, model.statistics_


class ClosedFormHeads(BaseEstimator):
    """Regularised canonical correlation with weights of the pairs (see ``heads``), for notebooks.

    ``fit``, ``transform`` and ``score`` take numpy's or torch's arrays and give the same kind.

    Attributes:
        heads_: the fitted heads, in float32.
        pair_weights_: (N,) how likely each pair is right.
        statistics_: what was chosen, and the share of wrong pairs.
    """

    def __init__(
        self,
        *,
        weights: bool = True,
        ridge: tuple[float, float] | None = None,
        power: float | None = None,
        embed_dim: int | None = None,
        transport_pairs: bool = False,
        epsilon: float = EPSILON,
    ) -> None:
        """Keep the settings, which ``fit`` checks.

        Args:
            weights: weigh pairs by how likely they are right.
            ridge: of images and of texts, relative to the mean eigenvalue of their covariance, at least
                0; None chooses both by the likelihood of held-out pairs.
            power: of the canonical correlations; None chooses it likewise.
            embed_dim: width of the embeddings; None takes the rank.
            transport_pairs: also match the pairs' own pictures and captions anew.
            epsilon: entropic regularisation of the transport.
        """
        self.weights, self.ridge, self.power = weights, ridge, power
        self.embed_dim, self.transport_pairs, self.epsilon = embed_dim, transport_pairs, epsilon

    def fit(
        self,
        X: Array,
        Y: Array,
        sample_weight: Array | None = None,
        unpaired_images: Array | None = None,
        unpaired_texts: Array | None = None,
    ) -> ClosedFormHeads:
        """Fit to image features (N, p) and text features (N, q); arguments as of ``fit_heads``."""
        images, texts = _matrix("image_features", X), _matrix("text_features", Y)
        if len(images) != len(texts):
            raise ValueError(
                f"image_features has {len(images)} rows, text_features {len(texts)}; a pair is a row of "
                "each"
            )
        weight = torch.ones(len(images), dtype=torch.float64, device=images.device)
        if sample_weight is not None:
            weight = torch.as_tensor(sample_weight, dtype=torch.float64, device=images.device)
            if weight.shape != (len(images),) or not (weight >= 0).all() or not weight.any():
                raise ValueError(
                    f"sample_weight must be {len(images)} numbers of at least 0, not all of them 0"
                )
        unpaired = _unpaired(unpaired_images, unpaired_texts, images, texts)
        pairs = ArrayPairs(images, texts, weight)
        course = Fit(pairs, self._options())
        self.heads_, self.statistics_ = course.run(unpaired)
        chances = torch.cat([course.chances(block) for block in pairs.blocks("Weights")])
        self.pair_weights_ = _like(chances, X)
        return self

    def _options(self) -> Options:
        for value in self.ridge or ():
            check_interval("ridge", value, 0.0, 1e6)
        if self.power is not None:
            check_interval("power", self.power, 0.0, 10.0)
        check_interval("epsilon", self.epsilon, MIN_EPSILON, 1e6)
        if self.embed_dim is not None and self.embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1, got {self.embed_dim}")
        return Options(**self.get_params())

    def transform(self, X: Array, Y: Array | None = None) -> Any:
        """Unit-norm embeddings (n, D) of image features, and of text features if ``Y`` is given."""
        check_is_fitted(self, "heads_")
        heads = self.heads_
        images = _like(heads.images(_matrix("image_features", X, len(heads.image_mean))), X)
        if Y is None:
            return images
        return images, _like(heads.texts(_matrix("text_features", Y, len(heads.text_mean))), Y)

    def score(self, X: Array, Y: Array) -> float:
        """Mean log-likelihood of n pairs among themselves, both ways together: 0 is best, in nats."""
        images, texts = (torch.as_tensor(each) for each in self.transform(X, Y))
        ones = torch.ones(len(images), device=images.device)
        return float(log_likelihood(images, texts, ones, [self.statistics_.logit_scale]))


def _matrix(name: str, features: Array, width: int | None = None) -> Tensor:
    """(n, width) features, finite, in float32."""
    features = torch.as_tensor(features).detach()
    if features.ndim != 2 or not features.is_floating_point() or not len(features):
        raise ValueError(
            f"{name} must be a float matrix with a row for each pair, got {tuple(features.shape)} of "
            f"{features.dtype}"
        )
    if width is not None and features.shape[1] != width:
        raise ValueError(f"{name} must be {width} wide as in fit, got {features.shape[1]}")
    bad = (~features.isfinite()).any(dim=1).nonzero()[:, 0]
    if len(bad):
        raise ValueError(f"{name} has NaN or infinity in {len(bad)} rows, first row {int(bad[0])}")
    return features.float()


def _like(values: Tensor, features: Array) -> Array:
    return values if isinstance(features, Tensor) else values.cpu().numpy()


def _unpaired(
    images: Array | None, texts: Array | None, paired_images: Tensor, paired_texts: Tensor
) -> Unpaired | None:
    if (images is None) != (texts is None):
        raise ValueError("unpaired_images and unpaired_texts go together: give both or none")
    if images is None:
        return None
    sides = zip(("unpaired_images", "unpaired_texts"), (images, texts), strict=True)
    widths = paired_images.shape[1], paired_texts.shape[1]
    both = [_matrix(*side, width) for side, width in zip(sides, widths, strict=True)]
    return Unpaired(*(each.to(paired_images.device) for each in both))
