"""The training command, by the open_clip that is installed."""

from __future__ import annotations

from collections.abc import Sequence

import open_clip


def main(argv: Sequence[str], prog: str = "otter-openclip train") -> int:
    """Run the adapter for the installed open_clip, 3.x or 4.x; returns the exit code.

    Raises:
        SystemExit: on bad flags, unsupported mixes or an open_clip outside the supported range, all
            before any data are read.
    """
    version = tuple(int(part) for part in open_clip.__version__.split(".")[:2])
    if (4, 2) <= version < (5, 0):
        from otter_openclip.training import open_clip_v4 as adapter
    else:
        from otter_openclip.training import open_clip_v3 as adapter
    return adapter.main(argv, prog)
