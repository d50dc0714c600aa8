"""Settings and features that the tests of the losses share."""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from otter_openclip import DistillationLoss, LabelSmoothingLoss, OtterLoss

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


def weights_of(images):
    """A weight for each pair, which any rank knows of its own."""
    return (images.detach()[:, 0] + 1) / 2


def weighted(kind):
    """The loss ``kind`` with ``weights_of`` its pairs."""

    class Weighted(kind):
        def forward(self, images, *further, **keywords):
            return super().forward(images, *further, pair_weights=weights_of(images), **keywords)

    return Weighted


SETTINGS = {
    "ls": lambda **kw: LabelSmoothingLoss(0.3, **kw),
    "ls-0": lambda **kw: LabelSmoothingLoss(0.0, **kw),
    "kd": lambda **kw: DistillationLoss(0.3, **kw),
    "kd-released": lambda **kw: DistillationLoss(vv_coef=1.0, tt_coef=1.0, **kw),
    "kd-coef": lambda **kw: DistillationLoss(0.3, 20.0, vv_coef=0.2, tt_coef=0.7, **kw),
    "otter": lambda **kw: OtterLoss(**kw),
    "otter-coef": lambda **kw: OtterLoss(0.8, vv_coef=0.2, tt_coef=1.7, iterations=3, **kw),
    "otter-no-images": lambda **kw: OtterLoss(vv_coef=0.0, **kw),
    "otter-keep": lambda **kw: OtterLoss(remove_diagonal=False, vv_coef=0.5, **kw),
    "otter-1": lambda **kw: OtterLoss(iterations=1, **kw),
    "otter-0": lambda **kw: OtterLoss(iterations=0, **kw),
    "otter-sharp": lambda **kw: OtterLoss(epsilon=0.01, **kw),
    "otter-sharpest": lambda **kw: OtterLoss(epsilon=1e-3, iterations=3, **kw),
    "otter-flat": lambda **kw: OtterLoss(epsilon=5.0, **kw),
    "otter-edge": lambda **kw: OtterLoss(epsilon=0.101, **kw),
    "otter-alpha-1": lambda **kw: OtterLoss(1.0, **kw),
    "ls-weighted": lambda **kw: weighted(LabelSmoothingLoss)(0.2, **kw),
    "otter-weighted": lambda **kw: weighted(OtterLoss)(0.6, **kw),
    "otter-shared": lambda **kw: OtterLoss(share_logit_scale=True, **kw),
}


def features(count, width=8, seed=0, spread=1.0):
    """Four float64 (count, width) feature sets of unit norm, around a common direction."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=generator, dtype=torch.float64)
    own = [torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(4)]
    return [F.normalize(common * (1 - spread) + spread * each, dim=1) for each in own]


def run(loss, inputs, log_scales=(2.5, 3.5), weights=(1.0, 2.0)):
    """Value of both terms; gradients of both towers and both scales; statistics; by name.

    The terms are back-propagated with different weights: a user may weigh them.
    """
    images, texts, *teacher = (x.detach().clone() for x in inputs)
    dtype = torch.promote_types(images.dtype, torch.float32)
    leaves = {"images": images, "texts": texts, "scale": torch.tensor(log_scales[0], dtype=dtype)}
    for leaf in leaves.values():
        leaf.requires_grad_()
    if getattr(loss, "distill_logit_scale", None) is not None:
        with torch.no_grad():
            loss.distill_logit_scale.fill_(log_scales[1]).grad = None
        leaves["distill_scale"] = loss.distill_logit_scale
    terms = loss(images, texts, leaves["scale"].exp(), *teacher, output_dict=True)
    total = sum(weight * term for weight, term in zip(weights, terms.values(), strict=False))
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {f"{name} gradient": g for name, g in zip(leaves, gradients, strict=True)}
    found |= {name: value.detach() for name, value in terms.items()}
    return found | getattr(loss, "target_statistics", {})


def assert_close(found, expected, tolerance):
    """All values of two ``run``s, up to ``tolerance`` of each one's largest entry (at least of 0.1)."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = tolerance * max(value.abs().max().item(), 0.1)
        difference = (found[name].double() - value.double()).abs().max().item()
        assert difference <= atol, f"{name}: {difference:.3g} off, {atol:.3g} allowed"


class Made(TorchDispatchMode):
    """Looks at every tensor that is made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.look(tensor)
        return made


class NoFloat64(Made):
    """A device without float64, as Apple's MPS: no tensor of it may be made."""

    def look(self, tensor):
        assert tensor.dtype != torch.float64
