"""Every implementation against ``impl="plain"``: values, gradients, statistics, every setting."""

import pytest
import torch
from loss_cases import SETTINGS, Made, NoFloat64, assert_close, features, run

from otter_openclip import OtterLoss, losses
from otter_openclip.fast import engine, plans, tiles

# In float32 a logit of 33 is known to 4e-6, a similarity times 100 to 8e-6; bfloat16 has 4e-3.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 8e-3}


@pytest.fixture(params=["dense", "streaming"])
def impl(request, monkeypatch):
    """An implementation, with tiles of four rows."""
    small_tiles(monkeypatch, rows=4, columns=21)
    return request.param


def small_tiles(monkeypatch, rows, columns):
    """Tiles of some rows, and products of two tiles' gradients."""
    monkeypatch.setattr(tiles, "TILE_ROWS", rows)
    monkeypatch.setitem(tiles.TILE_ENTRIES, "cpu", rows * columns)
    monkeypatch.setattr(tiles, "PRODUCT_ROWS", 2 * rows)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("spread", [1.0, 0.1])
@pytest.mark.parametrize("name", SETTINGS)
def test_as_plain(name, spread, dtype, impl):
    inputs = [x.to(dtype) for x in features(21, spread=spread)]
    exact = torch.promote_types(dtype, torch.float32)
    found = run(SETTINGS[name](impl=impl).to(exact), inputs)
    if dtype == torch.float32:  # against more digits
        inputs, exact = [x.double() for x in inputs], torch.float64
    assert_close(found, run(SETTINGS[name](impl="plain").to(exact), inputs), TOLERANCE[dtype])


def test_backward_twice_and_interleaved(impl):
    """Nothing saved for one backward is spent by it, or by another batch's forward."""
    images, texts, *teacher = (x.float() for x in features(21))
    loss, leaf = OtterLoss(impl=impl), images.requires_grad_()
    first = sum(loss(leaf, texts, torch.tensor(9.0), *teacher))
    sum(loss(texts, leaf.detach(), torch.tensor(9.0), *teacher[::-1]))
    (once,) = torch.autograd.grad(first, leaf, retain_graph=True)
    (twice,) = torch.autograd.grad(first, leaf)
    assert torch.equal(once, twice) and once.abs().sum() > 0


@pytest.mark.parametrize("impl", losses.IMPLEMENTATIONS)
def test_a_frozen_tower_is_fine(impl):
    images, texts, *teacher = (x.float() for x in features(21))
    texts.requires_grad_()
    sum(OtterLoss(impl=impl)(images, texts, torch.tensor(9.0), *teacher)).backward()
    assert texts.grad.abs().sum() > 0 and images.grad is None


def test_streaming_never_holds_a_matrix(monkeypatch):
    """The largest tensor made in forward or backward is a tile, or as large as the features."""

    class Largest(Made):
        entries = 0

        def look(self, x):
            self.entries = max(self.entries, x.untyped_storage().nbytes() // x.element_size())

    count = 200
    small_tiles(monkeypatch, rows=10, columns=count)
    images, texts, *teacher = (x.float() for x in features(count))
    images.requires_grad_()
    for impl, expected in (("streaming", 20 * count), ("plain", count * count)):
        with Largest() as seen:
            sum(OtterLoss(impl=impl)(images, texts, torch.tensor(9.0), *teacher)).backward()
        assert seen.entries == expected


def test_auto_keeps_matrices_while_they_are_an_eighth_of_memory(monkeypatch):
    like = torch.empty(0)
    monkeypatch.setattr(tiles, "device_memory", lambda device: 8 * 2 * 100 * 400 * 4)
    assert tiles.keeps_matrices("auto", 2 * 100 * 400, like)
    assert not tiles.keeps_matrices("auto", 2 * 100 * 400 + 1, like)
    assert tiles.keeps_matrices("dense", 10**12, like)
    assert not tiles.keeps_matrices("streaming", 1, like)


def test_plain_and_what_is_not_covered_run_without_the_fast_room(monkeypatch):
    monkeypatch.setattr(losses.fast, "terms", lambda *_: pytest.fail("fast was called"))
    inputs = features(6)
    ranks = {"world_size": 2, "local_loss": True, "gather_with_grad": True}
    run(OtterLoss(impl="plain").double(), inputs)
    run(SETTINGS["ls"](impl="dense").double(), inputs)
    assert not losses.fast.covers(OtterLoss(ot_scope="local", **ranks))
    assert not losses.fast.covers(OtterLoss(**ranks | {"gather_with_grad": False}))
    assert losses.fast.covers(OtterLoss(**ranks)) and losses.fast.covers(OtterLoss())


@pytest.mark.parametrize("impl", losses.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["ls", "kd", "otter", "otter-sharp"])
def test_a_device_without_float64_is_enough(name, impl, monkeypatch):
    inputs = [x.float() for x in features(12)]
    expected = run(SETTINGS[name](impl=impl), inputs)
    for module in (engine, plans):  # as on MPS
        monkeypatch.setattr(module, "sum_dtype", lambda device: torch.float32)
    with NoFloat64():
        found = run(SETTINGS[name](impl=impl), inputs)
    assert_close(found, expected, 1e-5)


def test_a_containers_memory_counts_and_not_the_machines(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(tiles, "CONTAINER_LIMITS", [tmp_path / "none", tmp_path / "memory.max"])
    machine = tiles.device_memory(cpu)
    for text, expected in (("max\n", machine), ("1048576\n", 2**20), (str(2**62), machine)):
        (tmp_path / "memory.max").write_text(text, encoding="utf-8")
        assert tiles.device_memory(cpu) == expected
