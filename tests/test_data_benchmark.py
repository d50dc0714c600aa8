"""The benchmark of the builders and the script that kills them, on a few pictures."""

from __future__ import annotations

import json
import random
import sys

import pytest
from tqdm import tqdm

from benchmarks import data, kills


def test_the_benchmark_runs(tmp_path, capsys):
    output = tmp_path / "data.json"
    data.main(["--images", "30", "--workers", "2", "--names", "1000", "--output", str(output)])
    found = json.loads(output.read_text())
    rows = {row["what"]: row for row in found["builds"]}
    assert [*rows][:4] == [
        *(f"data csv, {source}" for source in ("folder", "all.tar", "all.zip")),
        "plain loop",
    ]
    assert rows["plain loop"]["of plain"] == 1 and rows["data csv, folder"]["parent MiB"] > 10
    assert found["index"]["names"] == 1000 and found["index"]["disk MiB"] > 0.01
    assert 10_000 < found["bytes an image"] < 30_000
    said = capsys.readouterr().out
    assert ("img2dataset's writer" in rows) == ("its row is left out. --img2dataset" not in said)


def test_made_pictures_differ():
    drawn = data.pictures(1)[0]
    assert data.commented(drawn, "1") != data.commented(drawn, "2")


@pytest.mark.parametrize("case", ["csv-zip", "imagenet10k"])
def test_killed_builds(tmp_path, case):
    output = tmp_path / "kills.json"
    line = [
        "--parts",
        "builders",
        "--builders",
        case,
        "--kills",
        "3",
        "--images",
        "60",
        "--output",
        str(output),
    ]
    assert kills.main(line) == 0
    found = json.loads(output.read_text())
    assert found["failures"] == []
    assert 1 <= len(found["kills"]) <= 3  # one may come after the end


# Writes without a temporary name, goes on behind whatever it finds, and leaves a worker behind.
FAULTY = """
import os, signal, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--output") + 1])
out.mkdir(exist_ok=True)
worker = os.fork()
if worker == 0:
    time.sleep(60)
with open(out / "00000.tar", "ab") as file:
    for _ in range(20):
        file.write(bytes(100))
        file.flush()
        time.sleep(0.02)
os.kill(worker, signal.SIGKILL)
(out / "report.json").touch()
"""


def test_faults_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "_GONE_SECONDS", 0.2)
    monkeypatch.setattr(kills, "MANNERS", ("parent", "TERM"))
    (tmp_path / "faulty.py").write_text(FAULTY)
    trial = kills.Trial("faulty", [sys.executable, str(tmp_path / "faulty.py")], tmp_path)
    kills.try_case(trial, 4, random.Random(0), tqdm(disable=True))
    assert len(trial.kills) == 4
    for fault in ("1 processes are left", "00000.tar is unfinished", "contents: 00000.tar"):
        assert any(fault in failure for failure in trial.failures), (fault, trial.failures)
