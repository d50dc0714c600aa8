"""Commands killed at random moments: the same command goes on, and nothing is lost or changed.

Each is killed up to three times in a row on the way into one output, at the sight of a random one of
the names that it makes or shortly after, by SIGKILL or SIGTERM; and is then left to end. What it wrote
must be what a command wrote that nobody disturbed; so must what a killed one leaves under a final name.
OTTER_KILLS is the number of kills for each command, OTTER_SEED another course of them.
"""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from long_commands import NAMES, Command, Running, commands, names, temporary  # noqa: F401
from training_helpers import assert_same

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("OTTER_KILLS", 4))
SEED = int(os.environ.get("OTTER_SEED", 0))
IN_A_ROW = 3


@pytest.mark.parametrize("name", NAMES)
def test_the_same_command_goes_on(name, commands, tmp_path):  # noqa: F811
    command, rng = commands[name], random.Random(f"{name} {SEED}")
    whole = Running(command, tmp_path / "whole", again=False)
    began, seen = time.monotonic(), set()
    while whole.runs():
        seen |= names(whole.out)
        time.sleep(0.001)
    assert whole.wait() == 0, whole.said
    pause = (time.monotonic() - began) / (4 * len(seen))  # about what lies between two names
    kills = late = 0
    while kills < KILLS:
        assert late < 3 * KILLS, f"only {kills} of {KILLS} kills met a command"
        out, again = tmp_path / f"out-{kills}-{late}", False
        for _ in range(rng.randint(1, IN_A_ROW)):
            run, again = Running(command, out, again=again), True
            if not run.seen(rng.randint(1, len(seen))):
                late += 1
                break
            time.sleep(rng.random() * pause)
            kills += kill(command, run, rng.choice([signal.SIGKILL, signal.SIGTERM]), rng)
            for part, value in command.contents(out).items():
                assert_same(value, command.contents(whole.out)[part], part)
        run = Running(command, out, again=again)
        assert run.wait() == 0, run.said
        for contents in (command.contents, command.last):
            assert_same(contents(whole.out), contents(out))
        assert not temporary(out)


def kill(command: Command, run: Running, number: int, rng: random.Random) -> bool:
    """Kill a command, or one of its ranks; whether it was still there."""
    ranks = run.ranks() if "torch.distributed.run" in command.words else []
    try:
        os.kill(rng.choice(ranks) if ranks else run.process.pid, number)
    except ProcessLookupError:
        return False
    code = run.wait()
    if number == signal.SIGTERM and not ranks:
        assert code in (0, 128 + signal.SIGTERM), run.said
        assert not temporary(run.out), run.said
    assert not run.left()
    return True
