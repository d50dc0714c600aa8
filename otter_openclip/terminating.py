"""SIGTERM, which job schedulers send before they kill."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

EXIT_CODE = 128 + signal.SIGTERM


def _leave(*_: Any) -> None:
    raise SystemExit(EXIT_CODE)


@contextlib.contextmanager
def on_sigterm() -> Iterator[None]:
    """While active, SIGTERM ends the main thread as an error would, so that temporary files go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
