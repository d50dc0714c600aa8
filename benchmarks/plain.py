"""The published formulas of OTTER, written plainly: what the package is measured against.

Nothing is shared between the two directions, every step is the textbook operation on a full matrix, and
with several ranks each one gathers the whole cost (paper, equations 5 to 8; directions are averaged, as
in open_clip). No part of the package is imported.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def plain_sinkhorn(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Sinkhorn-Knopp that rewrites the whole (M, N) matrix at each half-iteration."""
    plan = torch.exp(-cost / epsilon)
    plan /= plan.sum()
    rows, columns = plan.shape
    for _ in range(iterations):
        plan /= plan.sum(dim=1, keepdim=True)
        plan /= rows
        plan /= plan.sum(dim=0, keepdim=True)
        plan /= columns
    return plan


def _gather(tensor: Tensor) -> Tensor:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def plain_otter(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    distill_scale: Tensor,
    *,
    alpha: float = 0.5,
    epsilon: float = 0.15,
    iterations: int = 5,
) -> Tensor:
    """The whole loss of this rank's (B, D) features; a scalar."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    count = len(images)
    own = torch.arange(rank * count, (rank + 1) * count, device=images.device)
    all_images, all_texts = _gather(images), _gather(texts)
    image_logits = torch.einsum("mc,nc->mn", images, all_texts)
    text_logits = torch.einsum("mc,nc->mn", texts, all_images)
    contrastive = F.cross_entropy(logit_scale * image_logits, own)
    contrastive = contrastive + F.cross_entropy(logit_scale * text_logits, own)

    with torch.no_grad():
        all_images, all_texts = _gather(teacher_images), _gather(teacher_texts)
        vt = torch.einsum("mc,nc->mn", teacher_images, all_texts)
        tv = torch.einsum("mc,nc->mn", teacher_texts, all_images)
        vv = torch.einsum("mc,nc->mn", teacher_images, all_images)
        tt = torch.einsum("mc,nc->mn", teacher_texts, all_texts)
        diagonal = torch.zeros_like(vv)
        diagonal[torch.arange(count, device=own.device), own] = 100.0
        vv, tt = vv - diagonal, tt - diagonal
        targets = []
        for cross in (vt, tv):
            cost = _gather(-(vv + tt + cross))
            plan = plain_sinkhorn(cost, epsilon, iterations)
            plan /= plan.sum(dim=1, keepdim=True)
            targets.append(plan[rank * count : (rank + 1) * count])

    kl_div = torch.nn.KLDivLoss(reduction="batchmean")
    distillation = sum(
        kl_div(F.log_softmax(distill_scale * logits, dim=1), target)
        for logits, target in zip((image_logits, text_logits), targets, strict=True)
    )
    return (alpha * contrastive + (1 - alpha) * distillation) / 2
