"""F@K and mean average precision of zero-shot classification, in bounded memory.

Scores are made in blocks and dropped: rows of images for F@K, columns of classes for the average
precision. Both need only the ranks of the few true labels, so nothing of size images x classes exists.
What needs float64 is done by numpy: not every device that computes scores has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from otter_openclip.numerics import at_least_float32, without_tf32

KS = (1, 2, 5, 10)
CHUNK_SIZE = 2**25

Pairs = tuple[np.ndarray, np.ndarray]  # image and class of each true label


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
        class_features: (C, D) unit-norm floats; computed on the device of ``image_features``, and in
            float64 only if those are.
        targets: for each image its true class indices, or an (N, C) array of zeros and ones.
        ks: the K of F@K. From K = C on, F@K is the share of images with any label.
        chunk_size: how many scores exist at a time; the peak is about four times that many floats.
        progress: show progress bars.

    Returns:
        ``{"flat_hit@K": ..., "mean_average_precision": ...}``, shares in [0, 1]. As in the reference
        and clip_benchmark, an image without labels is a miss and a class without images counts 0.

    F@K computes in at least float32 and ranks classes of equal score by index, lower first; classes of
    equal features always have equal scores. The average precision ranks images of equal score as
    clip_benchmark does, in whatever order ``torch.sort(scores, 0, True)`` leaves them on the CPU; under
    ``torch.autocast`` its scores are in autocast's dtype, as clip_benchmark's are.

    Raises:
        ValueError: if shapes do not fit, features are not finite, a label is not a class, or a K is
            not a positive whole number.
    """
    image_features, class_features = _check_features(image_features, class_features)
    if not ks or not all(isinstance(k, int | np.integer) and k is not True and k > 0 for k in ks):
        raise ValueError(f"K of F@K must be whole numbers of at least 1, got {ks!r}; e.g. {KS}")
    pairs = _true_pairs(targets, len(image_features), len(class_features))
    problem = image_features, class_features, pairs, chunk_size, progress
    with without_tf32():  # which would tie classes that differ
        places, precisions = _best_places(*problem), _average_precisions(*problem)
    hits = {k: places < min(k, len(class_features)) for k in ks}
    shares = {f"flat_hit@{k}": float(hit.mean()) for k, hit in hits.items()}
    return shares | {"mean_average_precision": float(precisions.mean())}


def _best_places(
    images: Tensor, classes: Tensor, pairs: Pairs, chunk_size: int, progress: bool
) -> np.ndarray:
    """How many classes come before each image's nearest true one, (N,); all C if it has none."""
    (image_of, class_of), device, count = pairs, images.device, len(classes)
    # Two columns of one product may differ in the last bit even where the vectors do not.
    vectors, column = torch.unique(classes.cpu(), dim=0, return_inverse=True)
    repeated = len(vectors) < count
    vectors = at_least_float32(vectors.to(device) if repeated else classes).T
    column, index = column.to(device), torch.arange(count, device=device)
    rows = max(1, chunk_size // count)
    starts = np.searchsorted(image_of, np.arange(len(images) + 1))
    places = []
    bar = tqdm(total=len(images), desc="F@K", unit="image", disable=not progress)
    with torch.autocast(device.type, enabled=False), bar:
        for begin in range(0, len(images), rows):
            block = at_least_float32(images[begin : begin + rows])
            scores = block @ vectors
            if repeated:
                scores = scores.index_select(1, column)
            here = slice(starts[begin], starts[begin + len(block)])
            image, label = image_of[here] - begin, class_of[here]
            value = scores[torch.from_numpy(image).to(device), torch.from_numpy(label).to(device)]
            value = value.cpu().numpy()
            best = np.full((len(block), 1), -np.inf, value.dtype)
            np.maximum.at(best[:, 0], image, value)
            nearest = value == best[image, 0]
            first = np.full((len(block), 1), count)
            np.minimum.at(first[:, 0], image[nearest], label[nearest])
            best, first = torch.from_numpy(best).to(device), torch.from_numpy(first).to(device)
            before = torch.where(index < first, scores >= best, scores > best)
            places.append(torch.count_nonzero(before, dim=1).cpu().numpy())
            bar.update(len(block))
    return np.concatenate(places)


def _average_precisions(
    images: Tensor, classes: Tensor, pairs: Pairs, chunk_size: int, progress: bool
) -> np.ndarray:
    """Average precision of each class, (C,) float64; 0 without images, which are not scored."""
    image_of, class_of = pairs
    order = np.argsort(class_of, kind="stable")
    present, first = np.unique(class_of[order], return_index=True)
    true = np.split(image_of[order], first[1:])
    result = np.zeros(len(classes))
    scaled = (100.0 * images).T  # clip_benchmark's scores
    columns = max(1, chunk_size // len(images))
    bar = tqdm(total=len(present), desc="Average precision", unit="class", disable=not progress)
    # numpy sorts outside of the interpreter's lock; with values alone several times faster than torch.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool, bar:
        for begin in range(0, len(present), columns):
            here = present[begin : begin + columns]
            scores = classes[torch.from_numpy(here).to(classes.device)] @ scaled
            rows = at_least_float32(scores).cpu().numpy()
            result[here] = list(pool.map(_average_precision, rows, true[begin : begin + columns]))
            bar.update(len(here))
    return result


def _average_precision(scores: np.ndarray, true: np.ndarray) -> float:
    """Of one class's (N,) scores, with the indices of its images."""
    positive, ordered = np.sort(scores[true])[::-1], np.sort(scores)
    above = len(scores) - np.searchsorted(ordered, positive, "right")
    if (len(scores) - np.searchsorted(ordered, positive, "left") - above > 1).any():
        # A true image ties with another: only the order that torch leaves them in says which is first.
        is_true = np.zeros(len(scores), bool)
        is_true[true] = True
        above = np.flatnonzero(is_true[torch.sort(torch.from_numpy(scores), 0, True)[1].numpy()])
    return float((np.arange(1, len(true) + 1) / (above + 1)).mean())


def _check_features(images: Any, classes: Any) -> tuple[Tensor, Tensor]:
    images, classes = torch.as_tensor(images), torch.as_tensor(classes)
    if images.dtype != torch.float64 and classes.dtype == torch.float64:
        classes = classes.float()  # the images' device may have no float64
    for name, features in (("image_features", images), ("class_features", classes)):
        if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
            raise ValueError(
                f"{name} must be a float matrix with a row for each feature, got "
                f"{tuple(features.shape)} of {features.dtype}"
            )
        if not features.isfinite().all():
            fault = f"{name} has NaN or infinity"
            raise ValueError(f"{fault}; the model's weights or its precision are to blame")
    both = torch.promote_types(images.dtype, classes.dtype)
    return images.to(both), classes.to(images.device, both)


def _true_pairs(targets: Any, num_images: int, num_classes: int) -> Pairs:
    """The true pairs by image, then class, each once; int64."""
    if isinstance(targets, Tensor):
        targets = targets.cpu().numpy()
    if isinstance(targets, np.ndarray) and targets.ndim == 2:
        if targets.shape != (num_images, num_classes):
            raise ValueError(
                f"targets have shape {targets.shape}, but there are {num_images} images and "
                f"{num_classes} classes"
            )
        images, classes = targets.nonzero()
        wrong = images[targets[images, classes] != 1]
        if len(wrong):
            raise ValueError(f"targets of image {wrong[0]} hold values other than 0 and 1")
        return images, classes
    if len(targets) != num_images:
        raise ValueError(f"targets are for {len(targets)} images, but there are {num_images}")
    lists = [np.asarray(target) for target in targets]
    for i, row in enumerate(lists):
        if row.ndim != 1 or (len(row) and row.dtype.kind not in "iu"):
            raise ValueError(
                f"targets of image {i} must be a list of class indices, got {targets[i]!r}"
            )
    images = np.repeat(np.arange(num_images), [len(row) for row in lists])
    classes = np.concatenate([row.astype(np.int64) for row in lists])
    outside = np.flatnonzero((classes < 0) | (classes >= num_classes))
    if len(outside):
        image, label = images[outside[0]], classes[outside[0]]
        raise ValueError(
            f"image {image} has the label {label}, but there are {num_classes} classes"
        )
    return np.divmod(np.unique(images * num_classes + classes), num_classes)
