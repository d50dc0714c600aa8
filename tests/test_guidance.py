"""What a run says of its targets after the first epoch."""

import logging
import re
from argparse import Namespace

import pytest
import torch
from training_helpers import train

from otter_openclip.training.objectives import advice

RUN = {"batch_size": 64, "accum_freq": 2, "world_size": 4, "loss": "otter", "sinkhorn_lambda": 0.15}


@pytest.mark.parametrize(
    ("entropy", "top", "loss", "said"),
    [
        (5.6, 0.02, "otter", "nearly uniform.*log 512 .*a smaller --sinkhorn-lambda .now 0.15"),
        (5.6, 0.02, "kd", "nearly uniform.*a larger --distill-T-t .now 20"),
        (0.2, 0.95, "otter", "nearly one-hot.*a larger --sinkhorn-lambda"),
        (0.2, 0.95, "kd", "nearly one-hot.*a smaller --distill-T-t"),
        (5.5, 0.1, "otter", "None"),
        (3.0, 0.4, "otter", "None"),
        (0.9, 0.8, "kd", "None"),
    ],
)
def test_advice(entropy, top, loss, said):
    args = Namespace(**RUN | {"loss": loss, "distill_T_t": 20.0})
    values = {"target_entropy": torch.tensor(entropy), "target_top_share": torch.tensor(top)}
    assert re.search(said, str(advice(values, args)))


def test_a_run_says_it_once(pairs, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(pairs, tmp_path, "--loss", "otter", "--epochs", "3")
        assert caplog.text.count("The targets are nearly uniform") == 1
