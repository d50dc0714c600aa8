"""Sinkhorn against the reference's recorded plans and its own invariances."""

from pathlib import Path

import numpy as np
import pytest
import torch

from otter_openclip import sinkhorn

GOLDEN = np.load(Path(__file__).parent / "golden" / "sinkhorn.npz")
CASES = sorted({key.split("/")[0] for key in GOLDEN})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_reference_plans(case, dtype, tolerance):
    cost = torch.tensor(GOLDEN[f"{case}/cost"], dtype=dtype)
    plan = sinkhorn(cost, float(GOLDEN[f"{case}/eps"]), int(GOLDEN[f"{case}/iters"]))
    expected = torch.tensor(GOLDEN[f"{case}/plan"], dtype=dtype)
    assert plan.dtype == dtype
    assert (plan - expected).abs().max() <= tolerance * expected.max()


def test_invariances():
    cost = torch.rand(12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plan = sinkhorn(cost, 0.2, 4)
    rows, columns = torch.randperm(12), torch.randperm(9)
    torch.testing.assert_close(sinkhorn(cost[rows][:, columns], 0.2, 4), plan[rows][:, columns])
    # A constant per row, or on the whole, changes nothing: rows are scaled first.
    torch.testing.assert_close(sinkhorn(cost + torch.rand(12, 1), 0.2, 4), plan)
    torch.testing.assert_close(sinkhorn(3 * cost, 0.6, 4), plan)
    batch = torch.stack([cost + 1, 2 * cost, cost])
    torch.testing.assert_close(sinkhorn(batch, 0.2, 4)[[0, 2]], torch.stack([plan, plan]))


def test_no_iterations_gives_the_normalised_kernel():
    cost = torch.rand(5, 6)
    expected = torch.exp(-cost / 0.3)
    torch.testing.assert_close(sinkhorn(cost, 0.3, 0), expected / expected.sum())


@pytest.mark.parametrize(
    ("cost", "epsilon", "iterations", "message"),
    [
        (torch.rand(4), 0.1, 1, "matrix"),
        (torch.rand(4, 4), 0.0, 1, "epsilon"),
        (torch.rand(4, 4), float("nan"), 1, "epsilon"),
        (torch.rand(4, 4), 0.1, -1, "iterations"),
    ],
)
def test_bad_arguments(cost, epsilon, iterations, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(cost, epsilon, iterations)


def test_an_infinite_row_or_column_has_no_mass_and_spoils_nothing():
    cost = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for rows, columns in (([], [1]), ([2], []), ([0, 3], [2])):
        holed = cost.clone()
        holed[rows], holed[:, columns] = torch.inf, torch.inf
        plan = sinkhorn(holed, 0.1, 5)
        assert plan.isfinite().all()
        assert plan[rows].sum() == 0 and plan[:, columns].sum() == 0
        sums = plan.sum(dim=0)
        torch.testing.assert_close(sums[sums > 0], torch.full_like(sums, 0.25)[len(columns) :])
