"""The script that kills commands, at a few moments of training; what it is for runs longer."""

import json
import subprocess
import sys

from benchmarks.kills import PARTS
from benchmarks.processes import ROOT


def test_killed_training(tmp_path):
    """Three times, at random and while a checkpoint is written; in a process that can be forked."""
    output = tmp_path / "kills.json"
    line = [sys.executable, "-m", "benchmarks.kills", "--parts", PARTS[0], "--kills-each", "3"]
    done = subprocess.run([*line, "--output", output], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    (row,) = json.loads(output.read_text())["commands"]
    assert row["kills"] == 3
