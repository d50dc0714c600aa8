"""F@K and mean average precision against clip_benchmark's code and plain definitions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics.zeroshot_classification import average_precision_per_class
from loss_cases import NoFloat64

from otter_openclip.evaluation import multilabel_metrics


def problem(images=300, classes=120, width=16, levels=None, seed=0):
    """Features and a dense target; with ``levels`` whole numbers, so that many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(n, width, generator=generator) for n in (images, classes)]
    if levels:
        features = [(f * levels).round() for f in features]
    else:
        features = [F.normalize(f, dim=1) for f in features]
    target = torch.rand(images, classes, generator=generator) < 0.05
    target[0] = False  # an image without labels, a class without images
    target[:, 0] = False
    return *features, target.to(torch.uint8)


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4000, 2**25])
def test_average_precision_is_clip_benchmarks(levels, amp, chunk_size):
    images, classes, target = problem(levels=levels)
    with torch.autocast("cpu", enabled=amp):
        # As clip_benchmark's run_classification: batch by batch.
        scores = torch.cat([(100.0 * part @ classes.T).float() for part in images.split(64)])
        found = multilabel_metrics(images, classes, target, chunk_size=chunk_size)
    expected = average_precision_per_class(scores, target).mean().item()
    assert found["mean_average_precision"] == pytest.approx(expected, abs=1e-6)
    reordered = average_precision_per_class(scores.flip(0), target.flip(0)).mean().item()
    if levels:  # the ties are real: another order of the images is another result
        assert abs(reordered - expected) > 1e-6


def test_lists_arrays_and_double_labels_agree():
    images, classes, target = problem()
    lists = [row.nonzero()[:, 0].tolist() for row in target]
    dense = multilabel_metrics(images, classes, target)
    assert multilabel_metrics(images, classes, [row + row[::-1] for row in lists]) == dense
    assert multilabel_metrics(images.numpy(), classes.numpy(), target.bool().numpy()) == dense


def test_k_beyond_the_classes_is_the_share_with_labels():
    images, classes, target = problem()
    found = multilabel_metrics(images, classes, target, ks=(120, 500))
    assert found["flat_hit@500"] == found["flat_hit@120"] == target.any(1).double().mean().item()


@pytest.mark.parametrize("distinct", [5, 23, 60])
def test_equal_classes_tie_however_they_are_scored(distinct):
    """Columns of one product differ in the last bits by where they are; equal classes must not."""
    vectors, images = problem(images=distinct, width=96)[0], problem(width=96, seed=1)[0]
    column = torch.arange(61) % distinct
    classes, target = vectors[column], problem(classes=61)[2]
    scores = (images.double() @ vectors.double().T)[:, column]
    nearest = scores.sort(dim=1, descending=True, stable=True).indices
    for count in (300, 299, 8, 1):
        precisions = []
        for chunk_size in (1, 61 * 7, 4001, 2**25):
            given = images[:count], classes, target[:count], range(1, 61)
            found = multilabel_metrics(*given, chunk_size=chunk_size)
            precisions.append(found.pop("mean_average_precision"))
            hits = target[:count].gather(1, nearest[:count]).cumsum(1).bool().double().mean(0)
            assert list(found.values()) == pytest.approx(hits[:60].tolist(), abs=1e-12)
        assert precisions == pytest.approx([precisions[0]] * 4, abs=1e-6)


@pytest.mark.parametrize("levels", [None, 1])
def test_devices_without_float64(levels):
    images, classes, target = problem(levels=levels)
    expected, doubled = multilabel_metrics(images, classes, target), classes.double()
    with NoFloat64():
        assert multilabel_metrics(images, classes, target) == expected
        assert multilabel_metrics(images, doubled, target) == expected
    assert all(type(value) is float for value in expected.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": [[3]] * 299}, "for 299 images, but there are 300"),
        ({"targets": [[0]] * 299 + [[120]]}, "image 299 has the label 120, but there are 120"),
        ({"targets": [1] * 300}, "must be a list of class indices"),
        ({"targets": np.zeros((300, 119), np.uint8)}, r"\(300, 119\)"),
        ({"targets": np.full((300, 120), 2)}, "other than 0 and 1"),
        ({"ks": (0,)}, r"at least 1, got \(0,\)"),
        ({"image_features": torch.full((300, 16), torch.nan)}, "image_features has NaN or inf"),
    ],
)
def test_bad_input(change, message):
    images, classes, target = problem()
    given = {"image_features": images, "class_features": classes, "targets": target}
    with pytest.raises(ValueError, match=message):
        multilabel_metrics(**(given | change))
