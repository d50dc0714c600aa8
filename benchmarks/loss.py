"""The loss step alone: forward and backward of one batch's features, time and memory over N.

``python -m benchmarks.loss`` compares, in one process and in turn,

* ``plain``: ``OtterLoss(impl="plain")``, the published formulas written out;
* ``dense`` and ``streaming``: the same loss by the other implementations;
* ``clip`` and ``distill``: open_clip's ``ClipLoss`` and ``DistillClipLoss``;

then the transport plan alone against POT and geomloss (``pip install .[benchmarks]``), and with
``--large N`` the streaming loss at a size where matrices do not fit, against its matrix products.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
from open_clip.loss import ClipLoss, DistillClipLoss

from benchmarks import common
from otter_openclip import OtterLoss, sinkhorn

WIDTH = 512
# Products of N x N x D multiply-adds: cosines 1, teacher 2, gradients 2.
DENSE_PRODUCTS = 5


def streaming_products(iterations: int) -> int:
    """The same for streaming: the teacher's anew each iteration and in both passes, cosines twice."""
    return 2 * iterations + 2 * (2 + 1) + 2


def contestant(name: str, count: int, device: str, dtype: torch.dtype) -> Callable[[], float]:
    """One forward and backward of the named loss."""
    images, texts, teacher_images, teacher_texts = common.features(count, WIDTH, device, dtype)
    images.requires_grad_(), texts.requires_grad_()
    scale = torch.tensor(30.0, device=device, requires_grad=True)
    distill = torch.tensor(49.4, device=device, requires_grad=True)
    teacher = (teacher_images, teacher_texts)
    if name in ("plain", "dense", "streaming"):
        loss = OtterLoss(impl=name).to(device)

    def total() -> Any:
        if name == "clip":
            return ClipLoss()(images.float(), texts.float(), scale)
        if name == "distill":
            given = (x.float() for x in (images, texts))
            return sum(DistillClipLoss()(*given, scale, *(x.float() for x in teacher), distill))
        return sum(loss(images, texts, scale, *teacher))

    def call() -> float:
        for leaf in (images, texts, scale, distill):
            leaf.grad = None
        value = total()
        value.backward()
        return value

    return call


def _rounds(rounds: int, count: int) -> int:
    return rounds if count < 8192 else min(rounds, 3 if count < 16384 else 1)


def compare(
    counts: list[int], rounds: int, device: str, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A row per N and contestant."""
    rows = []
    for count in counts:
        names = ["plain", "dense", "streaming", "clip", "distill"]
        calls = {name: contestant(name, count, device, dtype) for name in names}
        seconds = common.paired(calls, _rounds(rounds, count), device, f"N = {count}")
        product = common.product_rate(count, count, WIDTH, device)
        memory = {
            name: common.peak_memory(contestant, name, count, device, dtype, device=device)["added"]
            for name in names
        }
        for name in names:
            products = {"dense": DENSE_PRODUCTS, "streaming": streaming_products(5)}.get(name)
            median = statistics.median(seconds[name])
            rows.append(
                {
                    "N": count,
                    "loss": name,
                    "seconds": median,
                    "of plain": common.ratio(seconds[name], seconds["plain"]),
                    "MB": memory[name] / 1e6,
                    "MB of plain": memory[name] / memory["plain"],
                    "of its products": median / (products * product) if products else None,
                }
            )
        del calls
        print(common.table(rows[-len(names) :]), flush=True)
    return rows


def exponents(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Growth of time and memory with N, fitted from N = 2048 on."""
    found = []
    for name in dict.fromkeys(row["loss"] for row in rows):
        mine = [row for row in rows if row["loss"] == name and row["N"] >= 2048]
        if len(mine) > 1:
            sizes = [row["N"] for row in mine]
            fits = {key: common.growth(sizes, [r[key] for r in mine]) for key in ("seconds", "MB")}
            found.append({"loss": name, **{f"{key} ~ N^": value for key, value in fits.items()}})
    return found


def plan_alone(
    count: int, rounds: int, epsilon: float = 0.15, iterations: int = 5, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Our plan against POT's and geomloss's on one cost, with the marginal errors they reach."""
    import ot
    from geomloss import ot as geomloss

    _, _, images, texts = common.features(count, WIDTH, device)
    cost = -(images @ images.T + texts @ texts.T + images @ texts.T)
    cost.fill_diagonal_(3.0)
    mass = torch.full((count,), 1 / count, device=device)
    array, numpy_mass = cost.cpu().numpy(), mass.cpu().numpy()
    settings = {"numItermax": iterations, "stopThr": 0.0, "warn": False}

    def error(plan: Any) -> float:
        plan = torch.as_tensor(plan)
        both = (plan.sum(dim) * count - 1 for dim in (0, 1))
        return float(sum(x.abs().mean() for x in both) / 2)

    ours = error(sinkhorn(cost, epsilon, iterations))
    updates = iterations
    while error(geomloss.solve(cost, reg=epsilon, max_iter=updates).plan) > ours and updates < 80:
        updates *= 2
    calls = {
        "otter_openclip.transport": lambda: sinkhorn(cost, epsilon, iterations),
        "POT, torch": lambda: ot.sinkhorn(mass, mass, cost, epsilon, **settings),
        "POT, numpy": lambda: ot.sinkhorn(numpy_mass, numpy_mass, array, epsilon, **settings),
        f"geomloss, {updates} updates": lambda: (
            geomloss.solve(cost, reg=epsilon, max_iter=updates).plan
        ),
    }
    if device.startswith("cuda") and importlib.util.find_spec("flash_sinkhorn"):
        calls["FlashSinkhorn"] = flash_sinkhorn(images, texts, mass, epsilon, iterations)
    seconds = common.paired(calls, rounds, device, f"plan alone, N = {count}")
    first = next(iter(calls))
    return [
        {
            "N": count,
            "plan": name,
            "seconds": statistics.median(seconds[name]),
            "of ours": common.ratio(seconds[name], seconds[first]),
            "marginal error": error(call()),
        }
        for name, call in calls.items()
    ]


def flash_sinkhorn(
    images: torch.Tensor, texts: torch.Tensor, mass: torch.Tensor, epsilon: float, iterations: int
) -> Callable[[], torch.Tensor]:
    """Its plan of the same cost, the pairs themselves kept; it never holds the cost.

    ``v v' + t t' + v t'`` is a product of points, which half the squared distance is up to sums that the
    plan does not depend on.
    """
    from flash_sinkhorn.sinkhorn_solvers import sinkhorn_flashstyle_alternating

    x, y = torch.cat([images, texts], dim=1), torch.cat([images + texts, texts], dim=1)

    def plan() -> torch.Tensor:
        keywords = {"eps": epsilon, "n_iters": iterations, "cost_scale": 0.5, "allow_tf32": False}
        f, g = sinkhorn_flashstyle_alternating(x, y, mass, mass, **keywords)
        norms = [(z.square().sum(dim=1)) / 2 for z in (x, y)]
        logits = (x @ y.T + (f - norms[0])[:, None] + (g - norms[1])) / epsilon
        return logits.exp_() * mass[:, None] * mass

    return plan


def large(count: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Streaming once at a size where no N x N matrix could be held, in a process of its own."""
    memory = common.peak_memory(contestant, "streaming", count, device, dtype, device=device)
    tile = min(count, 512)
    product = common.product_rate(tile, count, WIDTH, device) * count / tile
    products = streaming_products(5)
    return {
        "N": count,
        "seconds": memory["seconds"],
        "products alone": products * product,
        "of its products": memory["seconds"] / (products * product),
        "process MB": memory["process"] / 1e6,
        "added MB": memory["added"] / 1e6,
        "one N x N matrix MB": count * count * 4 / 1e6,
    }


def draw(results: dict[str, Any], path: Any) -> None:
    """Time and memory over N, logarithmic both ways."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in zip(axes, ("seconds", "MB"), ("seconds", "peak MB added"), strict=True):
        for name in dict.fromkeys(row["loss"] for row in results["loss"]):
            mine = [row for row in results["loss"] if row["loss"] == name]
            axis.plot([r["N"] for r in mine], [r[key] for r in mine], "o-", label=name)
        axis.set(xscale="log", yscale="log", xlabel="N pairs", ylabel=label)
        ticks = sorted({row["N"] for row in results["loss"]})
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle("Loss, forward and backward, D = 512")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run everything asked for; prints tables, writes JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = [512, 1024, 2048, 4096, 8192, 16384]
    parser.add_argument(
        "--counts", type=int, nargs="*", default=sizes, help="N, any number of them"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plan", type=int, default=4096, help="N of the plan alone; 0: leave out")
    parser.add_argument("--large", type=int, default=0, help="N of the streaming loss by itself")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--name", default="loss", help="of the files in benchmarks/results")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    results: dict[str, Any] = {"machine": common.machine(args.device), "D": WIDTH}
    results["dtype"] = args.dtype
    if args.counts:
        results["loss"] = compare(args.counts, args.rounds, args.device, dtype)
        results["growth"] = exponents(results["loss"])
        if results["growth"]:
            print(common.table(results["growth"]))
    if args.plan:
        results["plan"] = plan_alone(args.plan, args.rounds)
        print(common.table(results["plan"]))
    if args.large:
        results["large"] = large(args.large, args.device, dtype)
        print(common.table([results["large"]]))
    path = common.save(args.name, results)
    if args.counts:
        draw(results, path.with_suffix(".png"))
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
