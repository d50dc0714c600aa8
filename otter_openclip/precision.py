"""Float32 where rounding would change results: autocast, TF32 and half precisions left out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def float32_math(device_type: str) -> Iterator[None]:
    """Leave autocast, and TF32 too: at a teacher scale of 100 its 1e-3 would be 10% of a target."""
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        stack.callback(torch.set_float32_matmul_precision, precision)
        yield


def at_least_float32(features: Tensor) -> Tensor:
    """Half precisions as float32, float64 as it is."""
    return features if features.dtype == torch.float64 else features.float()


def sum_dtype(device: torch.device) -> torch.dtype:
    """What long sums are taken in on ``device``: float64, which Apple's MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def half_precision(features: Iterable[Tensor]) -> torch.dtype | None:
    """The half precision that the towers computed ``features`` in, None if it was none.

    Under CUDA's autocast normalised features arrive as float32: its dtype is what counts.
    """
    features = list(features)
    device_type, dtypes = features[0].device.type, {x.dtype for x in features}
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        dtypes = {torch.get_autocast_dtype(device_type)}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16} else None
