"""The Triton kernel, in a process of its own: Triton must be imported with its interpreter on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_under_the_interpreter():
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.0."):
        pytest.skip("Triton 3.0's interpreter refuses arange of constants")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "interpreted_kernels.py"],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:]
