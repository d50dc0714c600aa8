"""OTTER, optimal transport distillation for CLIP (ICLR 2022), as a plugin of open_clip."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from otter_openclip import model_configs

if TYPE_CHECKING:
    from otter_openclip.closed_form.estimator import ClosedFormHeads, fit_heads
    from otter_openclip.losses import DistillationLoss, LabelSmoothingLoss, OtterLoss
    from otter_openclip.teacher import EmaTeacher
    from otter_openclip.transport import sinkhorn

__version__ = "0.1.0"
__all__ = [
    "ClosedFormHeads",
    "DistillationLoss",
    "EmaTeacher",
    "LabelSmoothingLoss",
    "OtterLoss",
    "fit_heads",
    "sinkhorn",
]

# Imported when a name is used: torch and open_clip take seconds, and most commands need neither.
_MODULES = {
    "ClosedFormHeads": "closed_form.estimator",
    "DistillationLoss": "losses",
    "EmaTeacher": "teacher",
    "LabelSmoothingLoss": "losses",
    "OtterLoss": "losses",
    "fit_heads": "closed_form.estimator",
    "sinkhorn": "transport",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


model_configs.register()
