"""Properties of the losses over shapes, dtypes, scales and settings, degenerate batches included."""

import math

import torch
import torch.nn.functional as F
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from otter_openclip import DistillationLoss, LabelSmoothingLoss, OtterLoss
from otter_openclip.losses import IMPLEMENTATIONS, MAX_COEF, MIN_LAMBDA

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KINDS = ("random", "identical", "zero", "one zero row", "duplicates", "opposite", "near")
NORMS = st.just(1.0) | st.floats(0.1, 4)
COEFS = st.sampled_from([0.0, 1.0, MAX_COEF]) | st.floats(0, 10)


def magnitude(low, high):
    return st.floats(math.log(low), math.log(high)).map(math.exp) | st.sampled_from([low, high])


@st.composite
def features(draw, count, width, dtype):
    """(count, width) rows of about one norm."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)
    kind = draw(st.sampled_from(KINDS))
    if kind == "identical":
        x = x[:1].expand_as(x).clone()
    elif kind == "zero":
        x.zero_()
    elif kind == "one zero row":
        x[0] = 0
    elif kind == "duplicates":
        x = x[torch.randint((count + 1) // 2, (count,), generator=generator)]
    elif kind == "opposite":
        x = x[:1] * torch.tensor([1.0, -1.0]).repeat(count)[:count, None]
    elif kind == "near":
        x = F.normalize(x[:1] + 1e-4 * x, dim=1)
    return (draw(NORMS) * x).to(dtype)


@st.composite
def batches(draw):
    count, dtype = draw(st.integers(1, 9)), draw(st.sampled_from(DTYPES))
    own, its = (draw(st.integers(1, 8)) for _ in range(2))
    return [draw(features(count, width, dtype)) for width in (own, own, its, its)]


@st.composite
def distillations(draw):
    """A function that makes a loss with a teacher, given impl; and the largest similarity's scale."""
    alpha = draw(st.floats(0, 1))
    coefs = {"vv_coef": draw(COEFS), "tt_coef": draw(COEFS)}
    if draw(st.booleans()):
        scale = draw(st.just(0.0) | magnitude(1e-3, 1e4))
        return lambda **kw: DistillationLoss(alpha, scale, **coefs, **kw)
    epsilon = draw(st.sampled_from([MIN_LAMBDA, 0.15]) | magnitude(MIN_LAMBDA, 1e6))
    rest = {"iterations": draw(st.integers(0, 6)), "remove_diagonal": draw(st.booleans())}
    return lambda **kw: OtterLoss(alpha, epsilon, **coefs, **rest, **kw)


def evaluated(loss, inputs, scale):
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:2]]
    terms = loss(*leaves, scale, *inputs[2:], output_dict=True)
    gradients = torch.autograd.grad(sum(terms.values()), leaves)
    return dict(terms) | dict(zip(("images", "texts"), gradients, strict=True))


def precision(loss, inputs, scale):
    """What rounding may do to a term: of the largest logarithm in the computation."""
    squares = [float(x.double().norm(dim=1).max()) ** 2 for x in inputs]
    teacher = loss.teacher_scale * (1 + loss.vv_coef + loss.tt_coef) * max(squares[2:])
    dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    return 64 * torch.finfo(dtype).eps * (1 + teacher + 100 * max(squares[:2]))


@examples(40)
@given(
    make=distillations(),
    inputs=batches(),
    scale=st.floats(1, 100),
    impl=st.sampled_from([name for name in IMPLEMENTATIONS if name != "plain"]),
    seed=st.integers(0, 2**32),
)
def test_every_implementation_is_plain_finite_and_of_no_order(make, inputs, scale, impl, seed):
    exact = torch.promote_types(inputs[0].dtype, torch.float32)
    plain, other = make(impl="plain").to(exact), make(impl=impl).to(exact)
    scale = torch.tensor(scale, dtype=exact)
    expected, found = (evaluated(loss, inputs, scale) for loss in (plain, other))
    assert all(value.isfinite().all() for value in expected.values()), expected
    # A gradient is the scale times what a target's entry is off, which is some logarithm's error.
    tolerance = precision(plain, inputs, scale)
    for name, value in expected.items():
        assert found[name].isfinite().all(), name
        factor = 1 if name.endswith("loss") else 100 * 4
        rounding = 4e-3 if name in ("images", "texts") and exact != inputs[0].dtype else 0
        error = (found[name].double() - value.double()).abs().max()
        allowed = factor * tolerance + rounding * value.double().abs().max()
        assert error <= allowed, (name, float(error), float(allowed))
    torch.testing.assert_close(
        other.target_statistics, plain.target_statistics, rtol=1e-3, atol=1e-4 + 10 * tolerance
    )
    assert expected["distill_loss"] >= -tolerance
    order = torch.randperm(len(inputs[0]), generator=torch.Generator().manual_seed(seed))
    permuted = plain.targets(*(x[order] for x in inputs[2:]))
    for targets, other in zip(plain.targets(*inputs[2:]), permuted, strict=True):
        assert (targets >= 0).all()
        assert (targets.double().sum(dim=1) - 1).abs().max() < 1e-5
        assert (targets[order][:, order] - other).abs().max() <= tolerance


@examples(20)
@given(
    inputs=batches(),
    make=distillations() | st.floats(0, 1).map(lambda e: lambda **kw: LabelSmoothingLoss(e, **kw)),
    impl=st.sampled_from(IMPLEMENTATIONS),
    where=st.tuples(st.integers(0, 3), st.integers(0, 8), st.integers(0, 7)),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_a_bad_number_is_never_silent(inputs, make, impl, where, bad):
    """Whatever the implementation: what watches the loss sees it."""
    loss, (which, row, column) = make(impl=impl), where
    if which > 1 and isinstance(loss, LabelSmoothingLoss):
        which -= 2
    x = inputs[which]
    x[row % len(x), column % x.shape[1]] = bad
    loss = loss.to(torch.promote_types(x.dtype, torch.float32))
    terms = loss(*inputs[:2], torch.tensor(10.0), *inputs[2:], output_dict=True)
    assert not sum(terms.values()).isfinite()
