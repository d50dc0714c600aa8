"""Arguments checked at the door, and float32 where rounding would change results."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Products of float32 in all their digits."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextlib.contextmanager
def float32_math(device_type: str) -> Iterator[None]:
    """Leave autocast, and TF32 too: at a teacher scale of 100 its 1e-3 would be 10% of a target."""
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(without_tf32())
        yield


def at_least_float32(features: Tensor) -> Tensor:
    """Half precisions as float32, float64 as it is."""
    return features if features.dtype == torch.float64 else features.float()


def sum_dtype(device: torch.device) -> torch.dtype:
    """What long sums are taken in on ``device``: float64, which Apple's MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_interval(name: str, value: float, low: float, high: float) -> float:
    """``value``; raises ValueError unless it is finite and in [low, high]."""
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value}")
    return value


def check_count(name: str, value: int) -> int:
    """``value``; raises ValueError unless it is a whole number of at least 0."""
    if not (isinstance(value, int) and value >= 0):
        raise ValueError(f"{name} must be a whole number of at least 0, got {value}")
    return value


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """``value``; raises ValueError unless it is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def check_features(images: Tensor, texts: Tensor, *teacher: Tensor) -> None:
    """Raise ValueError unless student and teacher have a row for each of the same B pairs."""
    if images.ndim != 2 or images.shape != texts.shape:
        raise ValueError(
            "image_features and text_features must both be (B, D), got "
            f"{tuple(images.shape)} and {tuple(texts.shape)}"
        )
    shapes = [tuple(x.shape) for x in teacher]
    if shapes and (shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != len(images)):
        raise ValueError(
            f"dist_image_features and dist_text_features must both be ({len(images)}, D'), one row for "
            f"each pair of the student's, got {shapes[0]} and {shapes[1]}"
        )
