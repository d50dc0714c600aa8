"""Arguments checked at the door: errors that name the argument and the value."""

from __future__ import annotations

import math

from torch import Tensor


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
