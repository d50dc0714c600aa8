"""Worker processes that end with their parent, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 3  # items a worker


def default_workers() -> int:
    """The CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """``map`` over processes, in order; ``items`` are taken a few ahead. One worker is this process.

    RuntimeError if a worker is killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # Forking saves each worker its imports; outside Linux it is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (os.getpid(),))
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            # Ctrl-C while processes are being started would leave some that nobody ends.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                pending.append(pool.submit(function, item))
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            if len(pending) > _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        fault = "a worker process was killed (out of memory?); what is finished is kept"
        fix = "the same command goes on from there, with fewer --workers if you like"
        raise RuntimeError(f"{fault}, and {fix}") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:  # an orphan would wait for work for ever
            time.sleep(0.3)
        os._exit(1)

    # Ctrl-C reaches the whole process group; the parent decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
