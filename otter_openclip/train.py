"""``python -m otter_openclip.train``: open_clip_train's command with ``--loss``."""

import sys

from otter_openclip.training.launcher import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], prog="python -m otter_openclip.train"))
