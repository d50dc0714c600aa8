"""What a rank sends over the number of ranks R, at a fixed total batch N.

The sharded loss (``--local-loss --gather-with-grad``) beside a gathered cost matrix, the published form.
Calls to torch.distributed are counted, on tensors without data, so any N is possible.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks import common
from otter_openclip import OtterLoss
from otter_openclip.replacing import replaced

WIDTH = 512


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Bytes handed to each collective, which sends nothing."""
    sent: Counter = Counter()

    def count(name: str, place: int) -> Any:
        def call(*args: Any, **_: Any) -> None:
            sent[name] += args[place].numel() * args[place].element_size()

        return dist, name, call

    with replaced(count("all_reduce", 0), count("all_gather", 1), count("all_to_all_single", 1)):
        yield sent


def count_sent(loss: str, total: int, world: int) -> int:
    """Bytes a rank hands over in one step, forward and backward, from shapes alone."""
    images, texts, *teacher = (
        F.normalize(torch.empty(total // world, WIDTH, device="meta"), dim=1) for _ in range(4)
    )
    images.requires_grad_(), texts.requires_grad_()
    keywords = {"local_loss": True, "gather_with_grad": True, "impl": loss}
    module = OtterLoss(rank=0, world_size=world, **keywords).to("meta")
    with counted() as sent:
        sum(module(images, texts, torch.tensor(30.0, device="meta"), *teacher)).backward()
    return sum(sent.values())


def without_features(loss: str, total: int, world: int) -> int:
    """Bytes a rank hands over for anything but features and their gradients."""
    # Three sets of features, and one gradient back.
    return count_sent(loss, total, world) - (3 * total // world + total) * WIDTH * 4


def gathered_cost(total: int, world: int) -> int:
    """Bytes a rank hands over if its rows of both directions' cost matrices are gathered."""
    return 2 * (total // world) * total * 4


def main() -> None:
    """Print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--total", type=int, default=32768, help="N")
    parser.add_argument("--name", default="scaling", help="of the file in benchmarks/results")
    args = parser.parse_args()
    rows = []
    for world in (2, 4, 8, 16, 64):
        gathered = gathered_cost(args.total, world)
        ours = without_features("streaming", args.total, world)
        rows.append(
            {
                "N": args.total,
                "R": world,
                "gathered cost MB": gathered / 1e6,
                "ours MB": ours / 1e6,
                "ours / gathered": ours / gathered,
                "ours with features MB": count_sent("streaming", args.total, world) / 1e6,
            }
        )
    print(common.table(rows))
    common.save(args.name, {"machine": common.machine(), "D": WIDTH, "sent": rows})


if __name__ == "__main__":
    main()
