"""``python -m otter_openclip.train``: open_clip_train's command with ``--loss``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str], prog: str = "otter-openclip train") -> int:
    """Run the adapter for the installed open_clip, 3.x or 4.x; returns the exit code.

    Raises:
        SystemExit: on bad flags, unsupported mixes or an open_clip outside the supported range, all
            before any data are read.
    """
    import open_clip

    version = tuple(int(part) for part in open_clip.__version__.split(".")[:2])
    if (4, 2) <= version < (5, 0):
        from otter_openclip.training import open_clip_v4 as adapter
    else:
        from otter_openclip.training import open_clip_v3 as adapter
    return adapter.main(argv, prog)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], prog="python -m otter_openclip.train"))
