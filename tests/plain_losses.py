"""The objectives as the design's text states them: whole matrices, plain autograd, the log domain."""

import math

import torch
import torch.nn.functional as F


def plain_targets(
    own,
    other,
    *,
    kind,
    own_coef=1.0,
    other_coef=1.0,
    epsilon=0.15,
    iterations=5,
    keep=False,
    rows=None,
):
    """(rows, N) targets of the rows' modality ``own``; ``rows`` solves their problem alone."""
    similarity = own_coef * own @ own.T + other_coef * other @ other.T + own @ other.T
    if kind == "kd":
        return (100.0 * similarity).softmax(dim=1) if rows is None else None
    log_plan = similarity / epsilon
    if not keep:
        log_plan.fill_diagonal_(-torch.inf)
    if rows is not None:
        log_plan = log_plan[rows]
    for _ in range(iterations):
        log_plan = log_plan.log_softmax(dim=1) - math.log(log_plan.shape[0])
        log_plan = log_plan.log_softmax(dim=0) - math.log(log_plan.shape[1])
    return log_plan.softmax(dim=1)


def plain_objective(
    images,
    texts,
    scale,
    distill_scale=None,
    teacher=None,
    *,
    kind,
    alpha=0.5,
    smoothing=0.0,
    vv=1.0,
    tt=1.0,
    detach_columns=False,
    ranks=None,
    **targets,
):
    """Contrastive and distillation terms, weighted; ``ranks`` solves each rank's problem alone."""
    count = len(images)
    eye = torch.eye(count, dtype=images.dtype)
    hard = (1 - smoothing) * eye + smoothing / max(count - 1, 1) * (1 - eye)
    contrastive, distillation = 0.0, 0.0
    for direction in (0, 1):
        own, other = (images, texts) if direction == 0 else (texts, images)
        cosines = own @ (other.detach() if detach_columns else other).T
        contrastive += -(hard * (scale * cosines).log_softmax(dim=1)).sum(dim=1).mean() / 2
        if teacher is None:
            continue
        coefs = {"own_coef": vv, "other_coef": tt}
        if direction == 1:
            coefs = {"own_coef": tt, "other_coef": vv}
        pair = teacher if direction == 0 else teacher[::-1]
        if ranks is None:
            target = plain_targets(*pair, kind=kind, **coefs, **targets)
        else:
            part = count // ranks
            target = torch.cat(
                [
                    plain_targets(
                        *pair, kind=kind, rows=slice(r * part, (r + 1) * part), **coefs, **targets
                    )
                    for r in range(ranks)
                ]
            )
        log_predicted = (distill_scale * cosines).log_softmax(dim=1)
        distillation += F.kl_div(log_predicted, target, reduction="batchmean") / 2
    if teacher is None:
        return (contrastive,)
    return alpha * contrastive, (1 - alpha) * distillation


def features(count, width=8, seed=0, spread=1.0):
    """Four float64 (count, width) feature sets of unit norm, around a common direction."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=generator, dtype=torch.float64)
    return [
        F.normalize(
            common * (1 - spread)
            + spread * torch.randn(count, width, generator=generator, dtype=torch.float64),
            dim=1,
        )
        for _ in range(4)
    ]
