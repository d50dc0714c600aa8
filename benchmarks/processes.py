"""Processes started by a benchmark: in sessions of their own, so that all of one can be found."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(command: Sequence[str | Path], log: Path) -> subprocess.Popen:
    """Start a command from this checkout, as the head of a session, with its output in ``log``."""
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*map(str, command)], stdout=file, stderr=file, cwd=ROOT, start_new_session=True
        )
    atexit.register(_end, process)  # Ctrl-C does not reach other sessions
    return process


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def members(session: int) -> list[int]:
    """The processes of a session that have not ended; orphans stay in it."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(entry))
    return found


def memory(pid: int, key: str, file: str = "status") -> int:
    """Bytes that /proc says of a process: ``VmHWM``, or ``Pss`` in smaps_rollup; 0 if it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0
