"""Paired timing, peak memory in a process of its own, and where results go."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from otter_openclip.files import write_json

WIDTHS, SHARED = (1280, 384), 64  # of towers' features, and of what their pairs share
RESULTS = Path(__file__).parent / "results"


def features(
    count: int, width: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list:
    """Student and teacher images and texts, unit norm: pairs around shared topics, as CLIP's are."""
    generator = torch.Generator().manual_seed(count)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    topics = noise(max(8, count // 16), width)
    topic = topics[torch.randint(len(topics), (count,), generator=generator)] + noise(count, width)
    cone = noise(width)
    return [
        F.normalize(topic + cone + 1.5 * noise(count, width), dim=1).to(device, dtype)
        for _ in range(4)
    ]


def paired_features(pairs: int, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """Features of two towers around shared topics, a third of the pairs wrong.

    Pairs of another ``seed`` have the same towers.
    """
    towers, drawn = torch.Generator(device).manual_seed(0), torch.Generator(device)
    drawn.manual_seed(seed + 1)
    topics, sides = torch.randn(pairs, SHARED, generator=drawn, device=device), []
    for width in WIDTHS:
        mixing = torch.randn(SHARED, width, generator=towers, device=device)
        noise = torch.randn(pairs, width, generator=drawn, device=device)
        sides.append(topics @ mixing + 8 * noise)
        topics[: pairs // 3] = topics[: pairs // 3].roll(1, dims=0)
    return sides


def draw(size: int, pairs: int, noise: float, seed: int) -> list[tuple[int, int]]:
    """Image and caption of each of ``pairs`` of ``size`` pairs; of a share ``noise`` not its own.

    Fewer pairs and less noise are subsets of more, with one seed.
    """
    rng = random.Random(seed)
    images = rng.sample(range(size), size)[:pairs]
    places = rng.sample(range(pairs), pairs)[: round(noise * pairs)]
    captions = list(images)
    for place, other in zip(places, [*places[1:], *places[:1]], strict=True):
        captions[place] = images[other]
    return list(zip(images, captions, strict=True))


def synchronize(device: str) -> None:
    """Wait for the device, if it runs on its own."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def paired(
    calls: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu", label: str = ""
) -> dict[str, list[float]]:
    """Seconds of each call in each round, run in turn after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in tqdm(range(rounds + 1), desc=label, leave=False):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def _resident(key: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def peak_here(call: Callable[[], Any]) -> dict[str, float]:
    """Bytes at the peak of ``call`` in this process: added by it, and in all; and its seconds."""
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")  # start the peak anew
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    peak = _resident("VmHWM")
    return {"added": peak - before, "process": peak, "seconds": seconds}


def _measure(function: Callable[..., Callable[[], Any]], args: tuple, queue: Any) -> None:
    queue.put(peak_here(function(*args)))


def peak_memory(
    function: Callable[..., Callable[[], Any]], *args: Any, device: str = "cpu"
) -> dict:
    """Bytes at the peak of ``function(*args)()`` in a fresh process: added by it, and in all."""
    if device.startswith("cuda"):
        call = function(*args)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated()
        return {"added": peak - before, "process": peak, "seconds": seconds}
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure, args=(function, args, queue))
    process.start()
    while process.is_alive() and queue.empty():
        process.join(0.2)
    if queue.empty():
        raise RuntimeError(f"the measuring process ended with code {process.exitcode}")
    found = queue.get()
    process.join()
    return found


def product_rate(rows: int, columns: int, width: int, device: str = "cpu") -> float:
    """Seconds of one (rows, width) x (width, columns) product in float32, best of five."""
    left, right = (
        torch.randn(rows, width, device=device),
        torch.randn(columns, width, device=device),
    )
    out = torch.empty(rows, columns, device=device)
    seconds = paired({"mm": lambda: torch.mm(left, right.T, out=out)}, 5, device)
    return min(seconds["mm"])


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys as aligned text."""
    cells = [[*rows[0]], *([_shown(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers were taken on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def save(name: str, results: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/NAME.json`` whole or not at all; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_json(path, results)
    return path
