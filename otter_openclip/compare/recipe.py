"""What is trained, and how: fixed before any result on the glyphs was known, alike for every loss.

* The paper's batch of 512 and initial scale of exp(3.9).
* AdamW at 1e-3 with weight decay 0.1, a tenth of the steps as warmup, then a cosine: usual for heads.
* 300 steps on pairs of one's own: on some thousand photos the best number lay before, for either loss,
  so that the course shows both sides. 1,000 on glyphs, which are farther from what the towers know.
* OTTER's lambda is 0.08. The paper's 0.15 is for towers that are trained too; with these frozen ones
  0.08 had been tried on photos with captions.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from otter_openclip.compare.dataset import Data

INIT_SCALE = 3.9
LEARNING_RATE, WEIGHT_DECAY, WARMUP = 1e-3, 0.1, 0.1
EPSILON, ITERATIONS = 0.08, 5


class Budget(NamedTuple):
    """What is spent on a run; ``pairs`` and ``test`` (for each test set) are of glyphs."""

    batch: int
    steps: int
    checkpoints: int
    pairs: int = 0
    test: int = 0


OWN = Budget(batch=512, steps=300, checkpoints=10)
GLYPHS = Budget(batch=512, steps=1000, checkpoints=10, pairs=3072, test=600)
QUICK = Budget(batch=32, steps=12, checkpoints=2, pairs=192, test=60)


def flags(loss: str, output: Path, data: Data, budget: Budget, seed: int) -> list[str]:
    """The training command's flags; an epoch is what lies between two checkpoints."""
    steps = budget.steps // budget.checkpoints
    given = [
        *("--loss", loss, "--model", f"local-dir:{output / 'towers'}"),
        *("--lock-image", "--lock-text", "--lock-text-freeze-layer-norm"),
        *("--feature-cache", str(output / "features")),
        *("--train-data", "::".join(map(str, data.shards))),
        *("--train-num-samples", str(steps * budget.batch), "--epochs", str(budget.checkpoints)),
        *("--logs", str(output / "logs"), "--name", loss, "--seed", str(seed)),
        *("--batch-size", str(budget.batch), "--workers", "1"),
        *("--lr", str(LEARNING_RATE), "--wd", str(WEIGHT_DECAY)),
        *("--warmup", str(int(WARMUP * budget.steps))),
        *("--save-frequency", "1", "--log-every-n-steps", str(max(1, steps // 5))),
    ]
    if loss == "otter":
        given += ["--sinkhorn-lambda", str(EPSILON), "--sinkhorn-iter", str(ITERATIONS)]
    return given
