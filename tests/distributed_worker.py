"""One rank of the loss tests: gradients on a shard of a fixed batch, and what was sent for them."""

import contextlib
import sys
from unittest import mock

import torch
import torch.distributed as dist
from open_clip import ClipLoss
from plain_losses import features

from otter_openclip import DistillationLoss, LabelSmoothingLoss, OtterLoss, blocks

COUNT, WIDTH = 24, 8
# name -> (our loss, the plain objective's keywords)
MAKE = {
    "infonce": (lambda **kw: ClipLoss(**kw), {"kind": "infonce"}),
    "ls": (lambda **kw: LabelSmoothingLoss(0.1, **kw), {"kind": "ls", "smoothing": 0.1}),
    "kd": (lambda **kw: DistillationLoss(0.3, **kw), {"kind": "kd", "alpha": 0.3}),
    "otter": (lambda **kw: OtterLoss(**kw), {"kind": "otter"}),
    "otter-sharp": (
        lambda **kw: OtterLoss(epsilon=1e-3, iterations=3, **kw),
        {"kind": "otter", "epsilon": 1e-3, "iterations": 3},
    ),
    "otter-keep": (
        lambda **kw: OtterLoss(remove_diagonal=False, vv_coef=0.5, **kw),
        {"kind": "otter", "keep": True, "vv": 0.5},
    ),
    "otter-alone": (lambda **kw: OtterLoss(ot_scope="local", **kw), {"kind": "otter"}),
}
# (local_loss, gather_with_grad)
FLAGS = [(True, True), (False, True), (True, False), (False, False)]
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all_single",
    "all_to_all",
)


def has_teacher(name):
    return name not in ("infonce", "ls")


def impls(name):
    return ("dense",) if name == "infonce" else ("dense", "streaming")


def gradients(loss, name, rows=slice(None)):
    """Feature gradients, the two scales' gradients, and the value, of ``rows`` of the batch."""
    images, texts, *teacher = (x[rows].clone() for x in features(COUNT, WIDTH, seed=5))
    images.requires_grad_(), texts.requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    given = {}
    if has_teacher(name):
        given = dict(zip(("dist_image_features", "dist_text_features"), teacher, strict=True))
    total = sum(loss(images, texts, scale.exp(), **given, output_dict=True).values())
    total.backward()
    found = {
        "images": images.grad,
        "texts": texts.grad,
        "scale": scale.grad,
        "value": total.detach(),
    }
    if has_teacher(name):
        found["distill_scale"] = loss.distill_logit_scale.grad
    return found


@contextlib.contextmanager
def counted():
    """Collect (collective, numbers handed over) of every call to torch.distributed."""
    calls = []

    def wrap(name, stock):
        def call(*args, **keywords):
            given = args[name in ("all_gather", "all_to_all_single")]
            given = given if isinstance(given, list | tuple) else [given]
            calls.append((name, sum(x.numel() for x in given)))
            return stock(*args, **keywords)

        return call

    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, wrap(name, getattr(dist, name))))
        yield calls


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    part = COUNT // world
    blocks.TILE_ENTRIES["cpu"], blocks.BLOCK_ENTRIES["cpu"] = 4 * COUNT, 2 * COUNT
    results = {}
    for name, (make, _) in MAKE.items():
        for local, with_grad in FLAGS:
            for impl in impls(name):
                keywords = {"local_loss": local, "gather_with_grad": with_grad}
                keywords |= {"rank": rank, "world_size": world}
                if name != "infonce":
                    keywords["impl"] = impl
                loss = make(**keywords).double()
                with counted() as calls:
                    found = gradients(loss, name, slice(rank * part, (rank + 1) * part))
                results[name, local, with_grad, impl] = {**found, "calls": calls}
    torch.save(results, f"{sys.argv[1]}/{rank}.pt")
    dist.destroy_process_group()
