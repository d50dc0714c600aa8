"""Commands on a disk without room: an error, nothing half-written, and with room all is made.

The operating system's limit on a file's size stands for the disk.
"""

from __future__ import annotations

import pytest
from long_commands import NAMES, Running, commands, temporary  # noqa: F401
from training_helpers import assert_same

pytestmark = pytest.mark.slow
SHARES = (0.3, 0.95)  # of the largest file


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ranks"])
def test_a_full_disk(name, commands, tmp_path):  # noqa: F811
    command = commands[name]
    whole = Running(command, tmp_path / "whole", again=False)
    assert whole.wait() == 0, whole.said
    expected = command.contents(whole.out) | command.last(whole.out)
    files = [path for path in whole.out.rglob("*") if path.is_file()]
    largest = max(path.stat().st_size for path in files)
    for share in SHARES:
        out = tmp_path / f"out-{share}"
        run = Running(command, out, again=False, largest_file=int(share * largest))
        assert run.wait() > 0, "a negative code is a signal's"
        assert "too large" in run.said or "full" in run.said
        assert not temporary(out)
        for part, value in command.contents(out).items():
            assert_same(value, expected[part], part)
        again = Running(command, out, again=True)
        assert again.wait() == 0, again.said
        assert_same(expected, command.contents(out) | command.last(out))
