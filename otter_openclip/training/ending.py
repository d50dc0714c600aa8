"""How a run ends by SIGTERM: between two steps, so that no checkpoint is cut short."""

from __future__ import annotations

import contextlib
import logging
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from otter_openclip.checkpoints.newest import newest_checkpoint
from otter_openclip.terminating import EXIT_CODE


def goes_on_from(args: Namespace) -> str:
    """Where ``--resume latest`` will begin, in words."""
    newest = newest_checkpoint(Path(args.checkpoint_path))
    where = "the start, as there is no checkpoint" if newest is None else str(newest)
    return f"the same command with --resume latest goes on from {where}"


class Ending:
    """SIGTERM in one run."""

    def __init__(self, args: Namespace) -> None:
        self._asked, self._args = False, args

    def listen(self) -> None:
        """From here on SIGTERM waits for the end of a step."""
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def leave_if_asked(self) -> None:
        """End the run if SIGTERM has come; rank 0 logs where it goes on.

        Raises:
            SystemExit: then.
        """
        if self._asked:
            if self._args.rank == 0:
                logging.warning(f"Ended by SIGTERM; {goes_on_from(self._args)}")
            raise SystemExit(EXIT_CODE)


class Steps:
    """A loader of open_clip's whose epochs end between two steps once SIGTERM has come."""

    def __init__(self, loader: Any, ending: Ending, check: Callable[[], None]) -> None:
        """``check`` is called after an epoch's last step, on every rank."""
        self._loader, self._ending, self._check = loader, ending, check

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        """The loader's batches; with the last one the epoch is whole, and goes into a checkpoint."""
        for count, batch in enumerate(self._loader, 1):
            yield batch
            if count < self._loader.num_batches:
                self._ending.leave_if_asked()
        self._check()
