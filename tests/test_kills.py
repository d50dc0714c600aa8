"""The script that kills commands, at a few moments of training; what it is for runs longer."""

import json

import forks

from benchmarks.kills import PARTS


def test_killed_training(tmp_path):
    """Three times, at random and while a checkpoint is written; in a process that can be forked."""
    output = tmp_path / "kills.json"
    line = ["-m", "benchmarks.kills", "--parts", PARTS[0], "--kills-each", "3", "--output", output]
    done = forks.run(*line)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    (row,) = json.loads(output.read_text())["commands"]
    assert row["kills"] == 3
