"""Work on many items in threads, with the results in the items' order.

Threads are enough, because Pillow and zlib give up Python's lock while they decode.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 3  # items a worker


def default_workers() -> int:
    """The CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """``map`` over threads, in order; ``items`` are taken a few ahead, in the caller's thread."""
    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[R]] = deque()
    # Filters of warnings belong to the process: a thread alone cannot set and restore them.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > _AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
