"""The processes of ``--distributed``, as one group."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def join(local_rank: int, rank: int, world_size: int) -> None:
    """Form the default process group, which must not exist yet.

    Raises:
        ValueError: if the environment does not say where to meet.
    """
    if "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"--distributed with {world_size} processes needs MASTER_ADDR and MASTER_PORT; launch "
            "with torchrun, or set them"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(days=1))
