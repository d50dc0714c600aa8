"""F@K and mean average precision of zero-shot classification, in bounded memory.

Scores are made in blocks and dropped: rows of images for F@K, columns of classes for the average
precision. Both need only the ranks of the few true labels, so nothing of size images x classes exists.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

KS = (1, 2, 5, 10)
CHUNK_SIZE = 2**25
# Narrower products take another path in BLAS, whose last bits differ from those of a whole product.
NARROWEST_BLOCK = 32


class Labels(NamedTuple):
    """The true (image, class) pairs, sorted by image, then class, each once.

    ``images`` and ``classes`` are (M,) int64 on the CPU.
    """

    images: Tensor
    classes: Tensor
    num_images: int
    num_classes: int


@torch.no_grad()
def multilabel_metrics(
    image_features: Tensor,
    class_features: Tensor,
    targets: Any,
    ks: Sequence[int] = KS,
    *,
    chunk_size: int = CHUNK_SIZE,
    progress: bool = False,
) -> dict[str, float]:
    """F@K (paper, section 4.1) and clip_benchmark's mean average precision.

    Args:
        image_features: (N, D) unit-norm floats, tensor or array.
        class_features: (C, D) unit-norm floats; computed on the device of ``image_features``.
        targets: for each image its true class indices, or an (N, C) array of zeros and ones.
        ks: the K of F@K. From K = C on, F@K is the share of images with any label.
        chunk_size: how many scores exist at a time; the peak is about four times that many floats.
        progress: show progress bars.

    Returns:
        ``{"flat_hit@K": ..., "mean_average_precision": ...}``, shares in [0, 1]. An image without
        labels counts as a miss, a class without images as an average precision of 0, as in the
        reference and in clip_benchmark.

    Ties: F@K ranks classes of equal score by index, lower first, and always computes in at least
    float32. The average precision ranks images of equal score as clip_benchmark does, in whatever
    order ``torch.sort(scores, 0, True)`` leaves them on the CPU; under ``torch.autocast`` its scores
    are in autocast's dtype, as clip_benchmark's are.

    Raises:
        ValueError: if shapes do not fit, features are not finite, a label is not a class, or a K is
            not a positive whole number.
    """
    image_features, class_features = _check_features(image_features, class_features)
    ks = check_ks(ks)
    labels = parse_targets(targets, len(image_features), len(class_features))
    hits = flat_hits(
        image_features, class_features, labels, ks, chunk_size=chunk_size, progress=progress
    )
    precisions = average_precisions(
        image_features, class_features, labels, chunk_size=chunk_size, progress=progress
    )
    return hits | {"mean_average_precision": precisions.mean().item()}


@torch.no_grad()
def flat_hits(
    image_features: Tensor,
    class_features: Tensor,
    labels: Labels,
    ks: Sequence[int] = KS,
    *,
    chunk_size: int = CHUNK_SIZE,
    progress: bool = False,
) -> dict[str, float]:
    """F@K alone, ``{"flat_hit@K": ...}``; arguments as in ``multilabel_metrics``."""
    image_features, class_features = _check_features(image_features, class_features)
    ks = check_ks(ks)
    device = image_features.device
    images, classes = _at_least_float32(image_features), _at_least_float32(class_features)
    num_images, num_classes = len(images), len(classes)
    starts = torch.searchsorted(labels.images, torch.arange(num_images + 1)).tolist()
    rows = max(1, chunk_size // num_classes)
    index = torch.arange(num_classes, device=device)
    hits = torch.zeros(len(ks), dtype=torch.int64, device=device)
    bar = tqdm(total=num_images, desc="F@K", unit="image", disable=not progress)
    with full_precision(), torch.autocast(device.type, enabled=False), bar:
        for begin in range(0, num_images, rows):
            end = min(begin + rows, num_images)
            scores = images[begin:end] @ classes.T
            pairs = slice(starts[begin], starts[end])
            image = (labels.images[pairs] - begin).to(device)
            label = labels.classes[pairs].to(device)
            value = scores[image, label]
            best = value.new_full((end - begin,), -torch.inf)
            best.scatter_reduce_(0, image, value, "amax")
            rank = _count(scores > best[:, None])
            # Another class may score exactly the same: then the lower index comes first.
            equal = _count(scores == best[:, None])
            tied = (equal > 1).nonzero()[:, 0]
            if len(tied):
                label = torch.where(value == best[image], label, num_classes)
                first = label.new_full((end - begin,), num_classes)
                first.scatter_reduce_(0, image, label, "amin")
                same = scores[tied] == best[tied, None]
                rank[tied] += (same & (index < first[tied, None])).sum(1)
            hits += torch.stack([(rank < min(k, num_classes)).sum() for k in ks])
            bar.update(end - begin)
    shares = (hits.double() / num_images).tolist()
    return {f"flat_hit@{k}": share for k, share in zip(ks, shares, strict=True)}


@torch.no_grad()
def average_precisions(
    image_features: Tensor,
    class_features: Tensor,
    labels: Labels,
    *,
    chunk_size: int = CHUNK_SIZE,
    progress: bool = False,
) -> Tensor:
    """Average precision of each class, (C,) float64 on the CPU; as in ``multilabel_metrics``."""
    image_features, class_features = _check_features(image_features, class_features)
    num_images = len(image_features)
    device = image_features.device
    # By class: only classes with images are scored.
    order = torch.argsort(labels.classes, stable=True)
    image_of, class_of = labels.images[order], labels.classes[order]
    present, counts = torch.unique_consecutive(class_of, return_counts=True)
    starts = [0, *counts.cumsum(0).tolist()]
    result = torch.zeros(labels.num_classes, dtype=torch.float64)
    scaled = (100.0 * image_features).T  # clip_benchmark's scores, to the last bit
    bar = tqdm(total=len(present), desc="Average precision", unit="class", disable=not progress)
    with full_precision(), bar, _Sorter(device) as sort:
        for begin, end in _blocks(len(present), max(NARROWEST_BLOCK, chunk_size // num_images)):
            classes = class_features[present[begin:end].to(device)]
            scores = classes @ scaled
            scores = scores if scores.dtype == torch.float64 else scores.float()
            pairs = slice(starts[begin], starts[end])
            row = torch.repeat_interleave(torch.arange(end - begin), counts[begin:end])
            result[present[begin:end]] = _block_precisions(
                scores, row, image_of[pairs], counts[begin:end], sort
            )
            bar.update(end - begin)
    return result


def _block_precisions(
    scores: Tensor, row: Tensor, image: Tensor, counts: Tensor, sort: _Sorter
) -> Tensor:
    """Average precision of the rows of ``scores`` (classes x images), true at (row, image)."""
    device, size = scores.device, scores.shape[1]
    first = counts.cumsum(0) - counts
    slot = torch.arange(len(row)) - first[row]
    # True labels' scores, ascending, each row filled up with infinity.
    positive = scores.new_full((len(counts), int(counts.max())), torch.inf)
    positive[row.to(device), slot.to(device)] = scores[row.to(device), image.to(device)]
    positive = sort(positive)
    everything = sort(scores.clone())
    counts_here = counts.to(device)[:, None]

    above_all = size - torch.searchsorted(everything, positive, right=True)
    equal_all = size - torch.searchsorted(everything, positive) - above_all
    right = torch.searchsorted(positive, positive, right=True)
    equal_positive = right - torch.searchsorted(positive, positive)
    place = torch.arange(positive.shape[1], device=device)
    valid = place < counts_here
    # The t-th true label from the top has t - 1 true ones above it and so many false ones:
    t = counts_here - place
    false_above = above_all - (counts_here - right)
    precision = torch.where(valid, t.double() / (t + false_above).double(), 0.0)
    result = (precision.sum(1) / counts_here[:, 0]).cpu()

    # A true and a false label with the same score: only the order of a sort can tell.
    tied = ((equal_all != equal_positive) & valid).any(1).cpu().nonzero()[:, 0].tolist()
    for k in tied:
        ranked = torch.sort(scores[k].cpu(), 0, True)[1]
        begin = int(first[k])
        true = torch.zeros(size, dtype=torch.bool)
        true[image[begin : begin + int(counts[k])]] = True
        at = true[ranked].nonzero()[:, 0].double() + 1
        result[k] = (torch.arange(1, len(at) + 1) / at).mean()
    return result


class _Sorter:
    """Sorts each row of a block in ascending order, in place on the CPU.

    There by numpy, whose vectorised sort of plain values is several times faster than torch's, which
    also carries the indices; in as many threads as torch uses.
    """

    def __init__(self, device: torch.device) -> None:
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads) if device.type == "cpu" else None

    def __enter__(self) -> _Sorter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()

    def __call__(self, block: Tensor) -> Tensor:
        if self.pool is None:
            return block.sort(dim=1).values
        parts = np.array_split(block.numpy(), self.threads)
        list(self.pool.map(lambda part: part.sort(axis=1), parts))
        return block


def _blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Split ``range(total)`` evenly into blocks of at most ``size``: no narrow last one."""
    number = -(-total // size)
    edges = [total * i // number for i in range(number + 1)] if number else []
    return itertools.pairwise(edges)


def _count(mask: Tensor) -> Tensor:
    """True entries of each row; numpy's count is several times faster than torch's on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
    return torch.count_nonzero(mask, dim=1)


def _at_least_float32(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 or bfloat16 inside float32 products: they would tie classes that differ."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_ks(ks: Sequence[int]) -> list[int]:
    """``ks`` without repetitions; raises ValueError unless all are positive whole numbers."""
    ks = list(dict.fromkeys(ks))
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ValueError(f"K of F@K must be a whole number of at least 1, got {k!r}")
    if not ks:
        raise ValueError("ks is empty; give at least one K, e.g. ks=(1, 2, 5, 10)")
    return ks


def _check_features(images: Any, classes: Any) -> tuple[Tensor, Tensor]:
    images, classes = torch.as_tensor(images), torch.as_tensor(classes)
    for name, features in (("image_features", images), ("class_features", classes)):
        if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
            raise ValueError(
                f"{name} must be a float matrix with a row for each feature, got "
                f"{tuple(features.shape)} of {features.dtype}"
            )
        if not features.isfinite().all():
            bad = (~features.isfinite()).any(1).nonzero()[:, 0]
            raise ValueError(
                f"{name} has {len(bad)} rows with NaN or infinity, the first is row {bad[0].item()}; "
                "the model's weights or its precision are to blame"
            )
    if images.shape[1] != classes.shape[1]:
        raise ValueError(
            f"image_features have {images.shape[1]} columns and class_features {classes.shape[1]}; "
            "both must come from the same model"
        )
    if images.dtype != classes.dtype:
        both = torch.promote_types(images.dtype, classes.dtype)
        images, classes = images.to(both), classes.to(both)
    return images, classes.to(images.device)


def parse_targets(targets: Any, num_images: int, num_classes: int) -> Labels:
    """The true pairs of ``targets``: lists of class indices, or an (N, C) array of zeros and ones.

    Raises:
        ValueError: naming the image, if there are not N of them, a label is not in 0..C-1, or an
            array has other values.
    """
    if isinstance(targets, Labels):
        return targets
    if isinstance(targets, Tensor):
        targets = targets.cpu().numpy()
    if isinstance(targets, np.ndarray) and targets.ndim == 2:
        images, classes = _dense_pairs(targets, num_images, num_classes)
    else:
        images, classes = _listed_pairs(targets, num_images, num_classes)
    pairs = np.unique(images * num_classes + classes)
    return Labels(
        torch.from_numpy(pairs // num_classes),
        torch.from_numpy(pairs % num_classes),
        num_images,
        num_classes,
    )


def _dense_pairs(
    targets: np.ndarray, num_images: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    if targets.shape != (num_images, num_classes):
        raise ValueError(
            f"targets have shape {targets.shape}, but there are {num_images} images and "
            f"{num_classes} classes"
        )
    rows = max(1, CHUNK_SIZE // num_classes)
    found = []
    for begin in range(0, num_images, rows):
        part = targets[begin : begin + rows]
        image, label = part.nonzero()
        if not (part[image, label] == 1).all():
            wrong = image[part[image, label] != 1][0] + begin
            raise ValueError(f"targets of image {wrong} hold values other than 0 and 1")
        found.append((image + begin, label))
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))


def _listed_pairs(
    targets: Sequence[Any], num_images: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    if len(targets) != num_images:
        raise ValueError(f"targets are for {len(targets)} images, but there are {num_images}")
    lists = [np.asarray(target) for target in targets]
    for i, row in enumerate(lists):
        if row.ndim != 1 or (len(row) and row.dtype.kind not in "iu"):
            raise ValueError(
                f"targets of image {i} must be a list of class indices, got {targets[i]!r}; or give an "
                "(images, classes) array of zeros and ones"
            )
    images = np.repeat(np.arange(num_images), [len(row) for row in lists])
    classes = np.concatenate([row.astype(np.int64) for row in lists])
    outside = (classes < 0) | (classes >= num_classes)
    if outside.any():
        at = outside.argmax()
        raise ValueError(
            f"image {images[at]} has the label {classes[at]}, but there are {num_classes} classes "
            f"(0 to {num_classes - 1})"
        )
    return images, classes
