"""One rank of the loss tests: gradients on a shard of a fixed batch, and what was sent for them."""

import torch
import torch.distributed as dist
from loss_cases import SETTINGS, features, run
from open_clip import ClipLoss

from otter_openclip import OtterLoss
from otter_openclip.fast import tiles
from otter_openclip.losses import IMPLEMENTATIONS

COUNT, WIDTH = 24, 8
# open_clip's own, as a loss that is called like ours
INFONCE = {"infonce": lambda impl=None, **kw: _ClipLoss(**kw)}
LOCAL = {"otter-local": lambda **kw: OtterLoss(ot_scope="local", **kw)}
NAMES = ("ls", "kd", "kd-coef", "otter", "otter-coef", "otter-keep", "otter-sharp", "otter-shared")
NAMES += ("ls-weighted", "otter-weighted")
MAKE = INFONCE | {name: SETTINGS[name] for name in NAMES} | LOCAL
# (local_loss, gather_with_grad)
FLAGS = [(True, True), (False, True), (True, False), (False, False)]
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single")


class _ClipLoss(ClipLoss):
    def forward(self, images, texts, scale, *_, output_dict):
        return super().forward(images, texts, scale, output_dict=output_dict)


def impls(name):
    plain = name in ("infonce", "ls", "ls-weighted", "otter-local")
    return ("plain",) if plain else IMPLEMENTATIONS[1:]


def counted(name, stock, calls):
    """A collective that notes in ``calls`` its name and how many numbers it is handed."""

    def call(*args, **keywords):
        sent = args[name in ("all_gather", "all_to_all_single")]
        tensors = sent if isinstance(sent, list | tuple) else [sent]
        calls.append((name, sum(x.numel() for x in tensors)))
        return stock(*args, **keywords)

    return call


def one_rank(rank, world, folder):
    """In a process of its own: write every loss's results to ``folder/RANK.pt``."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    part = COUNT // world
    tiles.TILE_ENTRIES["cpu"], tiles.TILE_ROWS, tiles.PRODUCT_ROWS = 4 * COUNT, 4, 8
    mine = [x[rank * part : (rank + 1) * part] for x in features(COUNT, WIDTH, seed=5)]
    results, calls = {}, []
    for name in COLLECTIVES:
        setattr(dist, name, counted(name, getattr(dist, name), calls))
    for name, make in MAKE.items():
        for local, with_grad in FLAGS:
            for impl in impls(name):
                keywords = {"local_loss": local, "gather_with_grad": with_grad, "impl": impl}
                loss = make(rank=rank, world_size=world, **keywords).double()
                calls.clear()
                results[name, local, with_grad, impl] = {**run(loss, mine), "calls": calls[:]}
    # One pair on each rank: a local plan then has a column without mass, its own pair's.
    keywords = {"local_loss": True, "gather_with_grad": True, "ot_scope": "local"}
    loss = OtterLoss(rank=rank, world_size=world, **keywords)
    single = [x[rank : rank + 1].float() for x in features(world, WIDTH)]
    results["one pair"] = run(loss, single)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
