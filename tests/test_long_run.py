"""The script of thousands of steps, for 150: nothing piles up, the teacher is its closed form."""

import logging

import pytest

from benchmarks.command_inputs import VIT, Inputs
from benchmarks.long_run import _BATCH, run

EPOCHS, STEPS = 6, 25


@pytest.fixture
def no_more_handlers():
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
        handler.close()


def test_nothing_piles_up(tmp_path, no_more_handlers):
    """From step 50, when a checkpoint has been written, to 150; memory says nothing in so few."""
    inputs = Inputs(tmp_path / "inputs", VIT)
    inputs.make(STEPS * _BATCH, trained=False)
    found = run(inputs, tmp_path / "out", "live", EPOCHS, STEPS, readings=3, settled=1 / 3)
    assert found["steps"] == EPOCHS * STEPS
    assert [fault for fault in found["faults"] if fault != "memory grows"] == []
    assert found["children"] == "1 to 1"  # the loader's
    assert not found["tensors"].startswith("0 ")
