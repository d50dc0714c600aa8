"""How a run ends: before its time by SIGTERM between two steps, or because a rank has died; and whole.

While it runs ``DataLoader.__iter__`` is replaced, so that no loader's processes outlive it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
import weakref
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader

from otter_openclip.checkpoints.newest import newest_checkpoint
from otter_openclip.replacing import replaced
from otter_openclip.terminating import EXIT_CODE

_DYING = 2.0  # seconds that a process's sockets may be closed before it is gone


def goes_on_from(args: Namespace) -> str:
    """Where ``--resume latest`` will begin, in words."""
    newest = newest_checkpoint(Path(args.checkpoint_path))
    where = "the start, as there is no checkpoint" if newest is None else str(newest)
    return f"the same command with --resume latest goes on from {where}"


class Ending:
    """SIGTERM and the deaths of other ranks, in one run."""

    def __init__(self) -> None:
        self.asked = False
        self._args: Namespace | None = None
        self._epoch = 0
        self._ranks: list[tuple[str, int]] = []  # host and process of each

    def start_epoch(self, args: Namespace, epoch: int) -> None:
        """From here on SIGTERM waits for the end of a step."""
        if self._args is None:
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGTERM, self._ask)
            if args.distributed:
                self._ranks = [("", 0)] * args.world_size
                dist.all_gather_object(self._ranks, (socket.gethostname(), os.getpid()))
        self._args, self._epoch = args, epoch

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def leave(self, what: str) -> None:
        """End the run after SIGTERM; ``what`` became of the epoch is logged by rank 0.

        Raises:
            SystemExit: always.
        """
        if self._args.rank == 0:
            logging.warning(f"Ended by SIGTERM: {what}; {goes_on_from(self._args)}")
        raise SystemExit(EXIT_CODE)

    def lose_epoch(self) -> None:
        """Likewise, in the midst of an epoch."""
        self.leave(
            f"what epoch {self._epoch} had done is lost, because open_clip's checkpoints hold whole "
            "epochs"
        )

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """An error that SIGTERM or another rank's death has caused ends the run with its cause."""
        try:
            yield
        except Exception as error:
            if self.asked:  # what a process of the job does when the others hear it first
                self.lose_epoch()
            if dead := self._dead():
                raise SystemExit(
                    f"error: rank {', '.join(map(str, dead))} of {len(self._ranks)} has ended (killed? "
                    f"out of memory? its own output says more), so this one, rank {self._args.rank}, "
                    f"cannot go on; {goes_on_from(self._args)}"
                ) from error
            raise

    def _dead(self) -> list[int]:
        """Ranks of this host whose process is gone."""
        until = time.monotonic() + (_DYING if self._ranks else 0)
        dead: list[int] = []
        while not dead and time.monotonic() < until:
            time.sleep(0.05)
            here = socket.gethostname()
            dead = [r for r, (host, pid) in enumerate(self._ranks) if host == here and _gone(pid)]
        return dead


class Steps:
    """A loader of open_clip's whose epochs end between two steps once SIGTERM has come."""

    def __init__(self, loader: Any, ending: Ending) -> None:
        self._loader, self._ending = loader, ending

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        """The loader's batches; with the last one the epoch is whole, and goes into a checkpoint."""
        for count, batch in enumerate(self._loader, 1):
            yield batch
            if self._ending.asked and count < self._loader.num_batches:
                self._ending.lose_epoch()


@contextlib.contextmanager
def loaders_ended() -> Iterator[None]:
    """While active loaders start processes as ever; in the end those are gone.

    Otherwise they live for as long as anything has the loader: an error's traceback, for one.
    """
    begun: weakref.WeakSet[Any] = weakref.WeakSet()
    stock = DataLoader.__iter__

    def start(loader: DataLoader) -> Any:
        iterator = stock(loader)
        begun.add(iterator)
        return iterator

    try:
        with replaced((DataLoader, "__iter__", start)):
            yield
    finally:
        for iterator in list(begun):
            if hasattr(iterator, "_shutdown_workers"):  # not one that has no processes
                with contextlib.suppress(RuntimeError):  # one of them was killed
                    iterator._shutdown_workers()


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return Path("/proc/self").exists()
    except OSError:
        return False
