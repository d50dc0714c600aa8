"""What a rank sends and holds over the number of ranks R, at a fixed total batch N.

The sharded loss (``--local-loss --gather-with-grad``) beside a gathered cost matrix, the published form.
What is sent is counted in calls to torch.distributed, on tensors without data, so any N is possible;
with ``--run`` the same is counted, and peak memory measured, in R real processes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F

from benchmarks import common
from otter_openclip import OtterLoss
from otter_openclip.replacing import replaced

WIDTH = 512


@contextlib.contextmanager
def counted(*, pretend: bool) -> Iterator[Counter]:
    """Bytes handed to each collective; with ``pretend`` nothing is sent."""
    sent: Counter = Counter()

    def wrap(name: str, given: int) -> Any:
        stock = getattr(dist, name)

        def call(*args: Any, **keywords: Any) -> Any:
            sent[name] += args[given].numel() * args[given].element_size()
            return None if pretend else stock(*args, **keywords)

        return dist, name, call

    with replaced(wrap("all_reduce", 0), wrap("all_gather", 1), wrap("all_to_all_single", 1)):
        yield sent


def one_step(loss: str, batch: int, rank: int, world: int, device: str) -> None:
    """Forward and backward of this rank's (batch, WIDTH) features."""
    make = torch.empty if device == "meta" else torch.randn
    images, texts, *teacher = (
        F.normalize(make(batch, WIDTH, device=device), dim=1) for _ in range(4)
    )
    images.requires_grad_(), texts.requires_grad_()
    scale = torch.tensor(30.0, device=device)
    keywords = {"local_loss": True, "gather_with_grad": True, "impl": loss}
    module = OtterLoss(rank=rank, world_size=world, **keywords).to(device)
    sum(module(images, texts, scale, *teacher)).backward()


def count_sent(loss: str, total: int, world: int) -> Counter:
    """Bytes a rank hands over in one step, by collective, from shapes alone."""
    with counted(pretend=True) as sent:
        one_step(loss, total // world, 0, world, "meta")
    return sent


def without_features(loss: str, total: int, world: int) -> int:
    """Bytes a rank hands over for anything but features and their gradients."""
    # Three sets of features, and one gradient back.
    features = (3 * total // world + total) * WIDTH * 4
    return sum(count_sent(loss, total, world).values()) - features


def gathered_cost(total: int, world: int) -> int:
    """Bytes a rank hands over if its rows of both directions' cost matrices are gathered."""
    return 2 * (total // world) * total * 4


def compare_sent(total: int, worlds: list[int]) -> list[dict[str, Any]]:
    """Rows of what is sent."""
    rows = []
    for world in worlds:
        gathered, ours = gathered_cost(total, world), without_features("streaming", total, world)
        with_all = sum(count_sent("streaming", total, world).values())
        rows.append(
            {
                "N": total,
                "R": world,
                "gathered cost MB": gathered / 1e6,
                "ours MB": ours / 1e6,
                "ours / gathered": ours / gathered,
                "ours with features MB": with_all / 1e6,
            }
        )
    return rows


def _rank(rank: int, world: int, loss: str, total: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    one_step(loss, world, rank, world, "cpu")  # warm up
    with counted(pretend=False) as sent:
        found = common.peak_here(lambda: one_step(loss, total // world, rank, world, "cpu"))
    torch.save({"sent": sum(sent.values()), **found}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run_ranks(loss: str, total: int, world: int) -> dict[str, int]:
    """Real processes: the most any rank sent and held."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (world, loss, total, folder), nprocs=world)
        ranks = [torch.load(Path(folder) / f"{r}.pt") for r in range(world)]
    return {key: max(rank[key] for rank in ranks) for key in ("sent", "added")}


def compare_ranks(total: int, worlds: list[int]) -> list[dict[str, Any]]:
    """Rows of what real ranks hold; raises if they send anything but what was counted."""
    rows = []
    for world in worlds:
        found = {loss: run_ranks(loss, total, world) for loss in ("plain", "dense", "streaming")}
        for loss, measured in list(found.items())[1:]:
            expected = sum(count_sent(loss, total, world).values()) if world > 1 else 0
            if measured["sent"] != expected:
                raise RuntimeError(f"{loss}, R = {world}: {measured['sent']} sent, not {expected}")
        rows.append(
            {
                "N": total,
                "R": world,
                **{f"{loss} MB": found[loss]["added"] / 1e6 for loss in found},
                "dense / plain": found["dense"]["added"] / found["plain"]["added"],
            }
        )
    return rows


def draw(results: dict[str, Any], path: Any) -> None:
    """Bytes sent and memory held over R."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    labels = {
        "gathered cost MB": "a gathered cost matrix",
        "ours MB": "OtterLoss, features aside",
        "ours with features MB": "OtterLoss, all",
    }
    sent, held = results["sent"], results.get("held", [])
    for key, label in labels.items():
        axes[0].plot([r["R"] for r in sent], [r[key] for r in sent], "o-", label=label)
    axes[0].set(yscale="log", ylabel="MB sent by a rank in a step")
    for key in ("plain MB", "dense MB", "streaming MB"):
        axes[1].plot([r["R"] for r in held], [r[key] for r in held], "o-", label=key[:-3])
    axes[1].set(ylim=(0, None), ylabel="peak MB added on a rank")
    for axis, rows in zip(axes, (sent, held), strict=True):
        if rows:
            ticks = [row["R"] for row in rows]
            axis.set(xscale="log", xlabel="ranks R", title=f"total batch N = {rows[0]['N']}")
            axis.set_xticks(ticks, [str(r) for r in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the tables, write JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--total", type=int, default=32768, help="N of what is counted")
    parser.add_argument("--run", type=int, default=4096, help="N in real processes; 0: leave out")
    parser.add_argument("--name", default="scaling", help="of the files in benchmarks/results")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results: dict[str, Any] = {"machine": common.machine(), "D": WIDTH}
    results["sent"] = compare_sent(args.total, [2, 4, 8, 16, 64])
    print(common.table(results["sent"]))
    if args.run:
        results["held"] = compare_ranks(args.run, [1, 2, 4, 8])
        print(common.table(results["held"]))
    path = common.save(args.name, results)
    draw(results, path.with_suffix(".png"))
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
