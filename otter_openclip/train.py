"""``python -m otter_openclip.train``: open_clip_train's command with ``--loss``."""

from __future__ import annotations

import sys

from otter_openclip.training.launcher import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], prog="python -m otter_openclip.train"))
