"""Commands on a full disk and in a read-only folder: an error that says so, nothing half-written.

Outputs go to a tmpfs of several sizes, so it takes root and ``mount``. What stays under a final name
must be what the undisturbed command wrote, and the same command must succeed once there is room.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import command_inputs, common
from benchmarks.kill_commands import Case, cases, same, start
from otter_openclip import cli

SHARES = (0.1, 0.4, 0.7, 0.95)  # of what the undisturbed command writes


def attempt(case: Case, folder: Path, again: bool, work: Path) -> tuple[int, str]:
    """Exit code and what is printed last."""
    log = work / "log"
    log.unlink(missing_ok=True)
    line = [*case.make(folder), *(case.resume if again else ())]
    status = os.waitpid(start(lambda: cli.main(line), log, {}), 0)[1]
    lines = [text for text in log.read_text().splitlines() if text.strip()]
    return os.waitstatus_to_exitcode(status), lines[-1] if lines else ""


def mounted(folder: Path, options: str) -> None:
    """Mount a tmpfs, or mount it anew with other options."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def fill(path: Path) -> None:
    """Leave no block of a disk free."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def try_case(case: Case, work: Path) -> list[dict[str, Any]]:
    """Disks of several sizes that become full, one that is, and a read-only folder."""
    out = work / case.name
    mounted(out, "size=512m")
    rows = []
    try:
        code, said = attempt(case, out, False, work)
        assert code == 0, said
        expected = case.contents(out)
        blocks = os.statvfs(out)
        used = (blocks.f_blocks - blocks.f_bfree) * blocks.f_frsize
        for share in SHARES:
            subprocess.run(["umount", str(out)], check=True)
            mounted(out, f"size={max(8192, int(share * used))}")
            rows.append(_row(case, f"{share:.0%} of the room", out, work, expected))
        subprocess.run(["umount", str(out)], check=True)
        mounted(out, "size=64k")
        fill(out / "others")
        rows.append(_row(case, "full", out, work, expected))
        subprocess.run(["umount", str(out)], check=True)
        mounted(out, "size=512m")
        subprocess.run(["mount", "-o", "remount,ro", str(out)], check=True)
        rows.append(_row(case, "read-only", out, work, expected))
    finally:
        subprocess.run(["umount", str(out)], check=True)
    return rows


def _row(case: Case, what: str, out: Path, work: Path, expected: dict[str, Any]) -> dict[str, Any]:
    code, said = attempt(case, out, False, work)
    found = case.contents(out)
    wrong = [name for name, value in found.items() if not same(value, expected.get(name))]
    left = [path.name for path in out.rglob("*.tmp")] + [p.name for p in out.rglob("*.unfinished")]
    subprocess.run(["mount", "-o", "remount,rw,size=512m", str(out)], check=True)
    again, _ = attempt(case, out, True, work)
    final = case.contents(out)
    whole = again == 0 and all(same(value, final.get(name)) for name, value in expected.items())
    return {
        "command": case.name,
        "disk": what,
        "code": code,
        "half-written": len(wrong) + len(left),
        "whole with room": whole,
        "says": said.replace(str(out), "OUT")[:160],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Try the commands; 1 if one left something half-written or did not come to its end with room."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("training", "cache", "export", "convert", "eval")
    parser.add_argument("--parts", choices=names, nargs="+", default=names)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        inputs = command_inputs.Inputs(work / "inputs")
        made = start(lambda: inputs.make(trained=True), work / "log", {})
        if os.waitpid(made, 0)[1]:
            raise RuntimeError((work / "log").read_text())
        inputs = command_inputs.Inputs(work / "inputs")
        rows = [row for part in args.parts for row in try_case(cases(inputs)[part], work)]
    print(common.table(rows))
    return int(any(row["half-written"] or not row["whole with room"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
