"""The paper's matching statistics, and the losses' targets, within batches of pairs.

A matching is the target of knowledge distillation: softmax of 100 times the cosines of pictures with the
batch's captions. All figures are of the image rows, and means over batches, as in the training log.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from otter_openclip.losses import DistillationLoss, OtterLoss

LIKELY = 0.2  # the paper's "likely to be matched"


def in_batches(images: Tensor, texts: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The whole batches of ``size`` pairs among N unit-norm features (N, D)."""
    whole = len(images) // size * size
    return list(zip(images[:whole].split(size), texts[:whole].split(size), strict=True))


def batch_statistics(images: Tensor, texts: Tensor, size: int) -> dict[str, Any]:
    """Everything about batches of ``size``."""
    batches = in_batches(images, texts, size)
    return {"batches": len(batches), **_mean([_of_batch(*batch) for batch in batches])}


def _of_batch(images: Tensor, texts: Tensor) -> dict[str, Any]:
    size = len(images)
    losses = {"kd": DistillationLoss(), "otter": OtterLoss()}
    targets = {name: loss.targets(images, texts)[0] for name, loss in losses.items()}
    matching = targets["kd"]
    on_pair = matching.diagonal().clone()
    elsewhere = matching.clone().fill_diagonal_(0)
    off = elsewhere[~torch.eye(size, dtype=torch.bool)]
    return {
        "diagonal": float(on_pair.mean()),
        "off_diagonal": float(off.mean()),
        "largest_off_diagonal": float(elsewhere.amax(dim=1).mean()),
        "own_is_largest": float((on_pair > elsewhere.amax(dim=1)).float().mean()),
        "over_0.2": float((off > LIKELY).sum()),
        "rows_with_one_over_0.2": float((elsewhere.amax(dim=1) > LIKELY).float().mean()),
        "targets": {
            "infonce": {"entropy": 0.0, "top_share": 1.0, "off_pair": 0.0},
            **{name: _target(loss, targets[name]) for name, loss in losses.items()},
        },
    }


def _target(loss: DistillationLoss, target: Tensor) -> dict[str, float]:
    """Of the image rows: entropy in nats, mass on the largest entry, mass that is not on the pair."""
    return {
        "entropy": float(loss.target_statistics["target_entropy"]),
        "top_share": float(loss.target_statistics["target_top_share"]),
        "off_pair": float(1 - target.diagonal().mean()),
    }


def _mean(rows: list[Any]) -> Any:
    """Means, entry by entry, of nested dicts that are alike."""
    if isinstance(rows[0], dict):
        return {key: _mean([row[key] for row in rows]) for key in rows[0]}
    return float(np.mean(rows))
