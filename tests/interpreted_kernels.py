"""The Triton kernel under its interpreter, on the CPU, against torch; run by ``test_kernels``."""

import pytest
import torch
from loss_cases import SETTINGS, assert_close, features, run

from otter_openclip import OtterLoss
from otter_openclip.fast import tiles
from otter_openclip.fast import triton_plans as kernels
from otter_openclip.fast.plans import LOG_ZERO, LogPlans


@pytest.fixture
def untried():
    kernels.works.cache_clear()
    yield
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
    expected = torch.logsumexp(matrix + biases[:, None].double(), dim=2)
    found = kernels.row_logsumexp(
        rows, columns, (0.3, 2.0, -0.7), biases, shift=1.5, diagonal=diagonal
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def launches(monkeypatch):
    """Counts the kernel's launches; streaming has several tiles."""
    monkeypatch.setitem(tiles.TILE_ENTRIES, "cpu", 16 * 48)
    monkeypatch.setattr(tiles, "TILE_ROWS", 16)
    counted, stock = [], kernels.row_logsumexp
    assert kernels.works(torch.device("cpu"))
    monkeypatch.setattr(
        kernels, "row_logsumexp", lambda *a, **k: counted.append(1) or stock(*a, **k)
    )
    return counted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["otter", "otter-keep", "otter-coef", "otter-sharp"])
def test_as_plain(launches, name, dtype):
    """Half-precision features, streaming: two launches an iteration and two after the last."""
    inputs = [x.to(dtype) for x in features(48, 16, spread=0.6)]
    loss = SETTINGS[name](impl="streaming")
    found = run(loss, inputs)
    assert len(launches) == 2 * loss.iterations + 2
    expected = run(SETTINGS[name](impl="plain"), inputs)
    assert len(launches) == 2 * loss.iterations + 2
    for key in ("images gradient", "texts gradient"):  # in the features' dtype
        assert found[key].dtype == dtype
    assert_close(found, expected, 2e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", ["float32", "mixed", "half"])
def test_under_autocast_its_dtype_decides(launches, dtype, given):
    """Normalised features arrive as float32 on CUDA, or some do: towers computed in autocast's dtype."""
    inputs = [x.to(dtype).float() for x in features(48, 16, spread=0.6)]
    if given != "float32":
        inputs = [x.to(dtype) if given == "half" or i % 2 else x for i, x in enumerate(inputs)]
    loss = OtterLoss(impl="streaming")
    with torch.autocast("cpu", dtype=dtype):
        terms = loss(*inputs[:2], torch.tensor(9.0), *inputs[2:])
    assert len(launches) == 12
    exact = OtterLoss(impl="plain")(*inputs[:2], torch.tensor(9.0), *inputs[2:])
    torch.testing.assert_close(terms, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("dtypes", "impl"),
    [
        ((torch.float32, torch.float32), "streaming"),
        ((torch.float32, torch.bfloat16), "streaming"),
        ((torch.bfloat16, torch.float16), "streaming"),
        ((torch.bfloat16, torch.bfloat16), "dense"),
    ],
)
def test_otherwise_torch(launches, dtypes, impl):
    """Float32 or mixed teacher features, and matrices that are held."""
    images, texts, *teacher = (x.float() for x in features(48, 16))
    teacher = [x.to(dtype) for x, dtype in zip(teacher, dtypes, strict=True)]
    assert sum(OtterLoss(impl=impl)(images, texts, torch.tensor(9.0), *teacher)).isfinite()
    assert launches == []


def test_a_kernel_that_does_not_run_or_errs_is_not_used(untried, monkeypatch, caplog):
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
    kept = tiles.RowTiles(
        lambda part, out: out.copy_(log_kernel[part]), (16, 48), log_kernel, keep=True
    )
    expected = LogPlans(kept, 1)
    found = kernels.TritonPlans(kept, 1, (*mine, images, texts), (0.5, 2.0, 1.0), 3.0, offset)
    expected.solve(4), found.solve(4)
    for name in ("_rows", "_columns", "masses"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4, msg=name
        )
