"""The losses against the reference's recorded values, and on hard input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_cases import DEVICES, features, weights_of
from open_clip import ClipLoss

from otter_openclip import DistillationLoss, LabelSmoothingLoss, OtterLoss

FOLDER = Path(__file__).parent / "golden"
GOLDEN = np.load(FOLDER / "losses.npz")
SETTINGS = json.loads((FOLDER / "losses.json").read_text(encoding="utf-8"))


def make_loss(setting, impl):
    names = {"alpha": "alpha", "vv": "vv_coef", "tt": "tt_coef"}
    distill = {name: setting[key] for key, name in names.items() if key in setting}
    mode = setting["mode"]
    if mode == "infonce":
        return ClipLoss()
    if mode == "ls":
        return LabelSmoothingLoss(setting["label_smoothing"], impl=impl)
    if mode == "kd":  # the released code has both coefficients at 1
        distill = {"vv_coef": 1.0, "tt_coef": 1.0} | distill
        return DistillationLoss(teacher_scale=setting.get("T_t", 100.0), impl=impl, **distill)
    return OtterLoss(
        impl=impl,
        epsilon=setting.get("lam", 0.15),
        iterations=setting.get("iters", 5),
        remove_diagonal=setting.get("remove_diag", True),
        **distill,
    )


def relative(value, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return ((value.double().cpu() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("impl", ["plain", "auto"])
@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("device", DEVICES)
def test_reference_values_and_gradients(case, impl, device):
    setting = SETTINGS[case]
    golden = {key.split("/")[1]: GOLDEN[key] for key in GOLDEN if key.startswith(f"{case}/")}
    loss = make_loss(setting, impl).to(device)

    def given(name):
        return torch.tensor(golden[name]).float().to(device)

    images = given("image_features").requires_grad_()
    texts = given("text_features").requires_grad_()
    log_scale = torch.tensor(setting.get("T", 3.9), requires_grad=True, device=device)
    teacher = {}
    if setting["mode"] in ("kd", "otter"):
        with torch.no_grad():
            loss.distill_logit_scale.fill_(setting.get("T_s", 3.9))
        teacher = {
            "dist_image_features": given("teacher_image_features"),
            "dist_text_features": given("teacher_text_features"),
        }
        image_targets, text_targets = loss.targets(*teacher.values())
        assert relative(image_targets, golden["target_image"]) < 2e-5
        assert relative(text_targets, golden["target_text"]) < 2e-5

    # The reference differentiates through the normalisation of its features.
    student = F.normalize(images), F.normalize(texts), log_scale.exp()
    terms = loss(*student, **teacher, output_dict=True)
    # Its directions are summed, ours averaged; its terms are recorded before alpha.
    alpha = setting.get("alpha", 0.5) if teacher else 1.0
    assert relative(2 * terms["contrastive_loss"].detach() / alpha, golden["contrastive"]) < 2e-5
    if teacher:
        distillation = 2 * terms["distill_loss"].detach() / (1 - alpha)
        assert relative(distillation, golden["distillation"]) < 2e-5
    total = sum(terms.values())
    assert relative(2 * total.detach(), golden["total"]) < 2e-5
    total.backward()
    assert relative(2 * images.grad, golden["grad_image"]) < 1e-4
    assert relative(2 * texts.grad, golden["grad_text"]) < 1e-4
    assert relative(2 * log_scale.grad, golden["grad_T"]) < 1e-4
    if teacher:
        assert relative(2 * loss.distill_logit_scale.grad, golden["grad_T_s"]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "loss", [LabelSmoothingLoss(0.1), DistillationLoss(), OtterLoss(), OtterLoss(impl="plain")]
)
def test_autocast_around_it_changes_nothing(loss, dtype):
    images, texts, *teacher = (x.to(dtype) for x in features(32))
    results = []
    for autocast, kind in ((True, dtype), (False, torch.float32)):
        leaf = images.to(kind, copy=True).requires_grad_()
        rest = (x.to(kind) for x in (texts, torch.tensor(30.0), *teacher))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            terms = loss(leaf, *rest, output_dict=True)
        (gradient,) = torch.autograd.grad(sum(terms.values()), leaf)  # where open_clip's loop does
        assert all(value.dtype == torch.float32 for value in terms.values())
        results.append([*terms.values(), gradient.to(dtype)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


def test_iterations_bring_the_marginals_nearer():
    """What the other statistics are is in test_analyze.py, and that of every implementation is one."""
    errors = []
    for iterations in (1, 50):
        loss = OtterLoss(iterations=iterations)
        loss.targets(*(x.float() for x in features(24)[2:]))
        errors.append(loss.target_statistics["marginal_error"])
    assert 1e-3 < errors[0] and errors[1] < 1e-2 * errors[0]


def test_shared_scale_is_the_models():
    images, texts, *teacher = (x.float() for x in features(12))
    scale = torch.tensor(3.9).exp()
    shared = OtterLoss(share_logit_scale=True)
    assert shared.distill_logit_scale is None and not list(shared.parameters())
    expected = OtterLoss()(images, texts, scale, *teacher)
    torch.testing.assert_close(shared(images, texts, scale, *teacher), expected)


@pytest.mark.parametrize("impl", ["plain", "auto"])
def test_a_scale_of_one_number_is_a_scale(impl):
    """open_clip's ``nonscalar_logit_scale``; and a plain number."""
    inputs = [x.float() for x in features(6)]
    results = []
    for scale in (torch.tensor(9.0, requires_grad=True), torch.tensor([9.0], requires_grad=True)):
        images = inputs[0].clone().requires_grad_()
        loss = sum(OtterLoss(impl=impl)(images, inputs[1], scale, *inputs[2:]))
        loss.sum().backward()
        assert scale.grad.shape == scale.shape and scale.grad.abs().sum() > 0
        results.append((loss.detach().reshape(()), images.grad))
    torch.testing.assert_close(*results)
    plain = sum(OtterLoss(impl=impl)(*inputs[:2], 9.0, *inputs[2:]))
    torch.testing.assert_close(plain.detach(), results[0][0])


def test_a_single_pair_is_finite():
    inputs = [x.float() for x in features(1)]
    for loss in (LabelSmoothingLoss(0.1), DistillationLoss(), OtterLoss()):
        terms = loss(*inputs[:2], torch.tensor(9.0), *inputs[2:], output_dict=True)
        assert sum(terms.values()).isfinite()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelSmoothingLoss(1.5), "smoothing must lie in .*1.5"),
        (lambda: DistillationLoss(alpha=-1), "alpha must lie in .*-1"),
        (lambda: DistillationLoss(teacher_scale=float("inf")), "teacher_scale"),
        (lambda: OtterLoss(epsilon=1e-40), "epsilon must lie in .*0.001.*got 1e-40"),
        (lambda: OtterLoss(iterations=2.5), "iterations must be .*2.5"),
        (lambda: OtterLoss(vv_coef=1e38), "vv_coef must lie in .*1e.38"),
        (lambda: OtterLoss(ot_scope="node"), "ot_scope must be one of global, local, got 'node'"),
        (lambda: OtterLoss(impl="fast"), "impl must be one of auto, dense, streaming, plain, got"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shapes_that_do_not_fit_are_named():
    images, texts, *teacher = (x.float() for x in features(6))
    with pytest.raises(ValueError, match=r"must both be \(B, D\), got \(6, 8\) and \(5, 8\)"):
        OtterLoss()(images, texts[:5], torch.tensor(9.0), *teacher)
    with pytest.raises(ValueError, match=r"must both be \(6, D'\).*got \(5, 8\) and \(5, 8\)"):
        OtterLoss()(images, texts, torch.tensor(9.0), *(x[:5] for x in teacher))


@pytest.mark.parametrize("impl", ["plain", "dense", "streaming"])
@pytest.mark.parametrize("make", [OtterLoss, DistillationLoss])
def test_without_a_teacher_the_student_is_its_own(make, impl):
    torch.manual_seed(0)
    student = [F.normalize(torch.randn(9, 5), dim=1) for _ in "vt"]
    results = []
    for teacher in ([], [x.detach().clone() for x in student]):
        inputs = [x.clone().requires_grad_() for x in student]
        loss = make(impl=impl)
        total = sum(loss(*inputs, torch.tensor(9.0), *teacher))
        results.append([total, *torch.autograd.grad(total, [*inputs, loss.distill_logit_scale])])
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match="go together: give both or none"):
        make(impl=impl)(*student, torch.tensor(9.0), dist_image_features=student[0])


@pytest.mark.parametrize("loss", [LabelSmoothingLoss(0.0), OtterLoss(1.0)])
def test_weights_multiply_each_pairs_contrastive_term(loss):
    images, texts, *teacher = features(9)
    weights = weights_of(images)
    keywords = {"pair_weights": weights, "output_dict": True}
    terms = loss.double()(images, texts, torch.tensor(7.0), *teacher, **keywords)
    logits, own = 7 * images @ texts.T, torch.arange(9)
    rows = [F.cross_entropy(x, own, reduction="none") for x in (logits, logits.T)]
    expected = (weights * (rows[0] + rows[1])).mean() / 2
    torch.testing.assert_close(terms["contrastive_loss"], expected)
