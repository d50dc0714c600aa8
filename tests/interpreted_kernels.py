"""The Triton kernel under its interpreter, on the CPU, against torch; run by ``test_kernels``."""

import pytest
import torch
from plain_losses import features

from otter_openclip import OtterLoss, blocks, kernels
from otter_openclip.sinkhorn import LOG_ZERO, LogPlans


@pytest.fixture(autouse=True)
def untried():
    kernels.works.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "total", "width"), [(64, 64, 32), (70, 131, 40), (1, 200, 8)])
@pytest.mark.parametrize("diagonal", [None, 0, 7, -9])
def test_row_logsumexp(dtype, size, total, width, diagonal):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(size, width, generator=generator).to(dtype) for _ in range(2)]
    columns = [torch.randn(total, width, generator=generator).to(dtype) for _ in range(2)]
    biases = torch.randn(2, total, generator=generator)
    (a, b), (c, d) = ([x.double() for x in pair] for pair in (rows, columns))
    matrix = 0.3 * (a @ c.T) + 2.0 * (b @ d.T) - 0.7 * (a @ d.T) - 1.5
    if diagonal is not None:
        matrix[torch.arange(total) == torch.arange(size)[:, None] + diagonal] = -torch.inf
    for count in (1, 2):
        expected = torch.logsumexp(matrix + biases[:count, None].double(), dim=2)
        found = kernels.row_logsumexp(
            rows, columns, (0.3, 2.0, -0.7), biases[:count], shift=1.5, diagonal=diagonal
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "keywords", [{}, {"remove_diagonal": False, "vv_coef": 0.3}, {"epsilon": 0.02}]
)
def test_streaming_through_the_kernel(monkeypatch, dtype, keywords):
    monkeypatch.setitem(blocks.TILE_ENTRIES, "cpu", 16 * 80)
    assert kernels.works(torch.device("cpu"))
    launches = []
    stock = kernels.row_logsumexp
    monkeypatch.setattr(
        kernels, "row_logsumexp", lambda *a, **k: launches.append(1) or stock(*a, **k)
    )
    results = []
    for impl in ("dense", "streaming"):
        images, texts, *teacher = (x.to(dtype) for x in features(80, 16, spread=0.6))
        images.requires_grad_(), texts.requires_grad_()
        loss = OtterLoss(impl=impl, iterations=3, **keywords)
        terms = loss(images, texts, torch.tensor(9.0), *teacher)
        sum(terms).backward()
        results.append([*terms, images.grad, texts.grad, *loss.target_statistics.values()])
        # Two launches an iteration, and only where matrices are not held.
        assert len(launches) == (0 if impl == "dense" else 6)
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_a_kernel_that_does_not_run_or_errs_is_not_used(monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(kernels, "row_logsumexp", fail)
    assert not kernels.works(torch.device("cpu"))
    assert "out of shared memory" in caplog.text
    kernels.works.cache_clear()
    monkeypatch.setattr(kernels, "row_logsumexp", lambda *_: torch.zeros(2, 100))
    assert not kernels.works(torch.device("cpu"))
    assert "is off by" in caplog.text
    images, texts, *teacher = (x.bfloat16() for x in features(20))
    terms = OtterLoss(impl="streaming")(images, texts, torch.tensor(9.0), *teacher)
    assert sum(terms).isfinite()


@pytest.mark.parametrize("offset", [0, 16, 32])
def test_a_shard_of_the_rows(offset):
    """Rows that are not the first: each one's own pair lies ``offset`` to the right."""
    _, _, images, texts = (x.half() for x in features(48, 8))
    mine = (images[offset : offset + 16], texts[offset : offset + 16])
    log_kernel = mine[0].float() @ images.float().T * 0.5 + mine[1].float() @ texts.float().T * 2.0
    log_kernel += mine[0].float() @ texts.float().T - 3.0
    log_kernel[:, offset : offset + 16].fill_diagonal_(LOG_ZERO)
    tiles = blocks.RowTiles(
        lambda part, out: out.copy_(log_kernel[part]), 16, 48, log_kernel, keep=True
    )
    expected = LogPlans(tiles, log_kernel, both=True)
    found = kernels.TritonPlans(
        *(tiles, log_kernel),
        rows=mine,
        columns=(images, texts),
        coefs=(0.5, 2.0, 1.0),
        shift=3.0,
        diagonal=offset,
        both=True,
    )
    expected.solve(4), found.solve(4)
    for name in ("column_potential", "row_potential", "_columns_own", "_columns_rows"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4, msg=name
        )
