"""SIGTERM, which job schedulers send before they kill."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

EXIT_CODE = 128 + signal.SIGTERM


def leave(*_: Any) -> None:
    """Signal handler: end the process as an error would, so that temporary files go."""
    raise SystemExit(EXIT_CODE)


@contextlib.contextmanager
def on_sigterm(handler: Callable[..., None] = leave) -> Iterator[None]:
    """While active, SIGTERM calls ``handler``; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
