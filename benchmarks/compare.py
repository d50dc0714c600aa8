"""The loss of this checkout against another one's, side by side: time over N.

``python -m benchmarks.compare OTHER`` starts a process for each, which work in turn. Needs of both:
``OtterLoss(epsilon=..., impl=...)``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import common

HERE = Path(__file__).parents[1]
WIDTH = 512


def work() -> None:
    """Time forward and backward for each line of stdin: N, implementation, epsilon."""
    from otter_openclip import OtterLoss

    for line in sys.stdin:
        count, impl, epsilon = json.loads(line)
        images, texts, *teacher = common.features(count, WIDTH)
        images.requires_grad_(), texts.requires_grad_()
        loss, scale = OtterLoss(epsilon=epsilon, impl=impl), torch.tensor(30.0, requires_grad=True)

        def call(loss: Any = loss, inputs: Any = (images, texts, scale, *teacher)) -> None:
            sum(loss(*inputs)).backward()

        call()
        print(json.dumps(common.peak_here(call)["seconds"]), flush=True)


def ask(process: subprocess.Popen, *setting: Any) -> float:
    """Seconds of one measurement in a worker."""
    process.stdin.write(json.dumps(setting) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def start(checkout: Path) -> subprocess.Popen:
    """A worker that imports the package from ``checkout`` and ``benchmarks`` from here."""
    script = (
        f"import sys; sys.path[:0] = [{str(checkout)!r}, {str(HERE)!r}]; import otter_openclip; "
        f"assert otter_openclip.__file__.startswith({str(checkout)!r}); "
        f"import importlib.util as u; s = u.spec_from_file_location('compare', {__file__!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); m.work()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, "-c", script], env=dict(os.environ), **pipes)


def main() -> None:
    """Print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="another checkout")
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384]
    )
    parser.add_argument("--impls", nargs="+", default=["auto"])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.15, 0.05])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    checkouts = {"other": args.other.resolve(), "this": HERE}
    rows = []
    settings = [(n, i, e) for n in args.counts for i in args.impls for e in args.epsilons]
    with contextlib.ExitStack() as stack:
        workers = {k: stack.enter_context(start(path)) for k, path in checkouts.items()}
        for setting in tqdm(settings):
            rounds = [
                {key: ask(worker, *setting) for key, worker in workers.items()}
                for _ in range(args.rounds)
            ]
            rows.append(
                {
                    **dict(zip(("N", "impl", "epsilon"), setting, strict=True)),
                    **{f"{k} s": statistics.median(r[k] for r in rounds) for k in workers},
                    "this / other": statistics.median(r["this"] / r["other"] for r in rounds),
                }
            )
        for worker in workers.values():
            worker.stdin.close()
    print(common.table(rows))
    common.save("compare", {"machine": common.machine(), "rows": rows})


if __name__ == "__main__":
    main()
