"""Dense and streaming alike: value, both terms' gradients, every setting, against plain autograd."""

import pytest
import torch
from plain_losses import features, plain_objective

from otter_openclip import DistillationLoss, LabelSmoothingLoss, OtterLoss, blocks

# name -> (our loss, the plain objective's keywords)
SETTINGS = {
    "ls": (lambda **kw: LabelSmoothingLoss(0.3, **kw), {"kind": "ls", "smoothing": 0.3}),
    "ls-0": (lambda **kw: LabelSmoothingLoss(0.0, **kw), {"kind": "ls"}),
    "kd": (lambda **kw: DistillationLoss(0.3, **kw), {"kind": "kd", "alpha": 0.3}),
    "kd-coef": (
        lambda **kw: DistillationLoss(vv_coef=0.2, tt_coef=0.7, **kw),
        {"kind": "kd", "vv": 0.2, "tt": 0.7},
    ),
    "otter": (lambda **kw: OtterLoss(**kw), {"kind": "otter"}),
    "otter-coef": (
        lambda **kw: OtterLoss(0.8, vv_coef=0.2, tt_coef=1.7, iterations=3, **kw),
        {"kind": "otter", "alpha": 0.8, "vv": 0.2, "tt": 1.7, "iterations": 3},
    ),
    "otter-keep": (
        lambda **kw: OtterLoss(remove_diagonal=False, **kw),
        {"kind": "otter", "keep": True},
    ),
    "otter-1": (lambda **kw: OtterLoss(iterations=1, **kw), {"kind": "otter", "iterations": 1}),
    "otter-0": (lambda **kw: OtterLoss(iterations=0, **kw), {"kind": "otter", "iterations": 0}),
    "otter-sharp": (lambda **kw: OtterLoss(epsilon=0.01, **kw), {"kind": "otter", "epsilon": 0.01}),
    "otter-flat": (lambda **kw: OtterLoss(epsilon=5.0, **kw), {"kind": "otter", "epsilon": 5.0}),
    "otter-edge": (
        lambda **kw: OtterLoss(epsilon=0.101, **kw),
        {"kind": "otter", "epsilon": 0.101},
    ),
    "otter-alpha-1": (lambda **kw: OtterLoss(1.0, **kw), {"kind": "otter", "alpha": 1.0}),
}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-5}


@pytest.fixture(params=["dense", "streaming"])
def impl(request, monkeypatch):
    """An implementation, with tiles of four and blocks of two rows."""
    monkeypatch.setitem(blocks.TILE_ENTRIES, "cpu", 4 * 21)
    monkeypatch.setitem(blocks.BLOCK_ENTRIES, "cpu", 2 * 21)
    return request.param


def both_terms(terms, leaves):
    """Values, and each term's gradients by itself: a user may weigh them."""
    found = []
    for i, term in enumerate(terms):
        found.append(term.detach())
        weight = 1.0 + i
        grads = torch.autograd.grad(
            weight * term, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        found += [g / weight for g in grads]
    return found


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("spread", [1.0, 0.1])
@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_gradients(name, spread, dtype, impl):
    make, keywords = SETTINGS[name]
    images, texts, *teacher = features(21, spread=spread)
    results = []
    for plain in (True, False):
        kind = torch.float64 if plain else dtype
        leaves = [x.to(kind, copy=True).requires_grad_() for x in (images, texts)]
        log_scales = [torch.tensor(x, dtype=kind, requires_grad=True) for x in (2.5, 3.5)]
        given = [x.to(kind) for x in teacher]
        if plain:
            scales = [x.exp() for x in log_scales]
            if keywords["kind"] == "ls":
                terms = plain_objective(*leaves, scales[0], **keywords)
            else:
                terms = plain_objective(*leaves, *scales, given, **keywords)
        else:
            loss = make(impl=impl).to(kind)
            if keywords["kind"] == "ls":
                terms = (loss(*leaves, log_scales[0].exp()),)
            else:
                with torch.no_grad():
                    loss.distill_logit_scale.fill_(3.5)
                log_scales[1] = loss.distill_logit_scale
                terms = loss(*leaves, log_scales[0].exp(), *given)
        results.append(both_terms(terms, [*leaves, *log_scales]))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == dtype
        # In float32 a logit of 33 is known to 4e-6.
        tolerance = TOLERANCE[dtype] * max(expected.abs().max().item(), 0.1)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_backward_twice_and_interleaved(impl):
    """Nothing saved for one backward is spent by it, or by another batch's forward."""
    images, texts, *teacher = (x.float() for x in features(21))
    loss, leaf = OtterLoss(impl=impl), images.requires_grad_()
    first = sum(loss(leaf, texts, torch.tensor(9.0), *teacher))
    sum(loss(texts, leaf.detach(), torch.tensor(9.0), *teacher[::-1]))
    (once,) = torch.autograd.grad(first, leaf, retain_graph=True)
    (twice,) = torch.autograd.grad(first, leaf)
    assert torch.equal(once, twice) and once.abs().sum() > 0


def test_a_frozen_tower_is_fine(impl):
    images, texts, *teacher = (x.float() for x in features(21))
    texts.requires_grad_()
    sum(OtterLoss(impl=impl)(images, texts, torch.tensor(9.0), *teacher)).backward()
    assert texts.grad.abs().sum() > 0 and images.grad is None


@pytest.mark.parametrize("make", [lambda **kw: LabelSmoothingLoss(0.1, **kw), OtterLoss])
def test_streaming_never_holds_a_matrix(make, monkeypatch):
    """The largest tensor made in forward or backward is a tile, or as large as the features."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor):
                    self.entries = max(
                        self.entries, x.untyped_storage().nbytes() // x.element_size()
                    )
            return out

    count, width = 200, 8
    monkeypatch.setitem(blocks.TILE_ENTRIES, "cpu", 10 * count)
    images, texts, *teacher = (x.float() for x in features(count, width))
    images.requires_grad_()
    for impl, expected in (("streaming", 10 * count), ("dense", count * count)):
        with Largest() as seen:
            out = make(impl=impl)(images, texts, torch.tensor(9.0), *teacher, output_dict=True)
            sum(out.values()).backward()
        assert seen.entries == expected


def test_auto_keeps_matrices_while_they_are_an_eighth_of_memory(monkeypatch):
    like = torch.empty(0)
    monkeypatch.setattr(blocks, "device_memory", lambda device: 8 * 2 * 100 * 400 * 4)
    assert blocks.keeps_matrices("auto", 2, 100, 400, like)
    assert not blocks.keeps_matrices("auto", 2, 101, 400, like)
    assert blocks.keeps_matrices("auto", 1, 101, 400, like)
    assert blocks.keeps_matrices("dense", 2, 10**6, 10**6, like)
    assert not blocks.keeps_matrices("streaming", 1, 2, 2, like)


@pytest.mark.parametrize("impl", ["fast", ""])
def test_unknown_implementation_lists_the_choices(impl):
    with pytest.raises(ValueError, match="impl must be one of auto, dense, streaming, got"):
        OtterLoss(impl=impl)
