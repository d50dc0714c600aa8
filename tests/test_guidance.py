"""What a run says of its targets after the first epoch."""

import re
from argparse import Namespace

import pytest
import torch
from training_helpers import parse_args

from otter_openclip.training.objectives import Objective, advice

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


def test_a_run_says_it_once_and_after_an_epoch(caplog):
    args = parse_args("--loss", "otter", "--batch-size", "64")
    ranks = {"device": "cpu", "rank": 0, "world_size": 1}
    objective = Objective(Namespace(**vars(args) | ranks))
    statistics = {"target_entropy": torch.tensor(4.1), "target_top_share": torch.tensor(0.1)}
    for epoch, said in enumerate((0, 1, 1)):
        objective.start_epoch(epoch)
        assert caplog.text.count("The targets are nearly uniform") == said
        objective.loss.target_statistics = statistics
