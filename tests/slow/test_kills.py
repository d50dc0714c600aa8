"""Commands killed at random moments: the same command goes on, and nothing is lost or changed.

Each is killed up to three times in a row on the way into one output, at a random moment or at the
sight of a random one of the names that it makes, by SIGKILL or SIGTERM; and is then left to end. What
it wrote must be what a command wrote that nobody disturbed; so must what a killed one leaves under a
final name.
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
KILLS = int(os.environ.get("OTTER_KILLS", 3))
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
    seconds = time.monotonic() - began
    wanted = KILLS if name != "ranks" else -(-KILLS // 3)  # two processes that import everything
    kills = late = 0
    while kills < wanted:
        assert late < 9 * wanted, f"only {kills} of {wanted} kills met a command"
        out, again = tmp_path / f"out-{kills}-{late}", False
        for _ in range(rng.randint(1, IN_A_ROW)):
            run, again = Running(command, out, again=again), True
            by_name = {"count": rng.randint(1, len(seen))}
            moment = rng.choice([by_name, {"seconds": rng.random() * seconds}])
            if not run.waits(**moment):
                late += 1
                break
            kills += kill(command, run, rng.choice([signal.SIGKILL, signal.SIGTERM]), rng)
            for part, value in command.contents(out).items():
                assert_same(value, command.contents(whole.out)[part], part)
        run = Running(command, out, again=again)
        assert run.wait() == 0, run.said
        for contents in (command.contents, command.last):
            assert_same(contents(whole.out), contents(out))


def kill(command: Command, run: Running, number: int, rng: random.Random) -> bool:
    """Kill a command, or one of its ranks; whether it was still there.

    After SIGTERM there are no more temporary files than before.
    """
    ranks = run.ranks() if "torch.distributed.run" in command.words else []
    try:
        os.kill(rng.choice(ranks) if ranks else run.process.pid, number)
    except ProcessLookupError:
        return False
    code = run.wait()
    if number == signal.SIGTERM and not ranks:
        # Before the handler is there, the signal ends the process itself.
        assert code in (0, 128 + signal.SIGTERM) or run.before == names(run.out), run.said
        assert temporary(run.out) <= run.before, run.said
    assert not run.left()
    return True
