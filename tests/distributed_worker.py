"""One rank of the loss tests: gradients on a shard of a fixed batch, for the parent to compare."""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip import ClipLoss

from otter_openclip import DistillationLoss, LabelSmoothingLoss, OtterLoss

MAKE = {
    "infonce": lambda **kw: ClipLoss(**kw),
    "ls": lambda **kw: LabelSmoothingLoss(0.1, **kw),
    "kd": lambda **kw: DistillationLoss(teacher_scale=20.0, **kw),
    "otter": lambda **kw: OtterLoss(**kw),
    "otter-sharp": lambda **kw: OtterLoss(epsilon=1e-3, iterations=3, **kw),
    "otter-keep": lambda **kw: OtterLoss(remove_diagonal=False, vv_coef=0.5, **kw),
}
COUNT = 24


def batch():
    """Four (24, 8) unit-norm float64 feature sets, the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    return [
        F.normalize(torch.randn(COUNT, 8, generator=generator).double(), dim=1) for _ in range(4)
    ]


def gradients(loss, rows=slice(None)):
    """Feature gradients, the two scales' gradients, and the value, of ``rows`` of the batch."""
    images, texts, teacher_images, teacher_texts = (x[rows] for x in batch())
    images, texts = images.clone().requires_grad_(), texts.clone().requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    teacher = {}
    if isinstance(loss, DistillationLoss):
        teacher = {"dist_image_features": teacher_images, "dist_text_features": teacher_texts}
    total = sum(loss(images, texts, scale.exp(), **teacher, output_dict=True).values())
    total.backward()
    found = {
        "images": images.grad,
        "texts": texts.grad,
        "scale": scale.grad,
        "value": total.detach(),
    }
    if isinstance(loss, DistillationLoss):
        found["distill_scale"] = loss.distill_logit_scale.grad
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    part = COUNT // world
    results = {}
    for name, make in MAKE.items():
        for local in (True, False):
            loss = make(local_loss=local, gather_with_grad=True, rank=rank, world_size=world)
            results[name, local] = gradients(loss.double(), slice(rank * part, (rank + 1) * part))
    torch.save(results, f"{sys.argv[1]}/{rank}.pt")
    dist.destroy_process_group()
