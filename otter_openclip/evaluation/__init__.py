"""F@K and mean average precision for any number of classes: in clip_benchmark, in training, alone."""

from typing import Any

__all__ = ["multilabel_metrics"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from otter_openclip.evaluation import metrics  # torch, only when it is used

    return getattr(metrics, name)
