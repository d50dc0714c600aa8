"""Writing checkpoints whole or not at all."""

from __future__ import annotations

import os
from typing import Any

import torch


def save(obj: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` to a temporary name, then renamed: a killed run leaves no torn checkpoint."""
    temporary = f"{os.fspath(path)}.tmp"
    torch.serialization.save(obj, temporary)  # torch.save may be replaced, to end up here
    os.replace(temporary, path)
