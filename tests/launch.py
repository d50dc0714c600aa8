"""Start the training command with the test models registered: a script for torchrun and forks."""

import os
import sys

import open_clip
import torch

from otter_openclip.train import main

if __name__ == "__main__":
    torch.use_deterministic_algorithms("DETERMINISTIC" in os.environ)
    open_clip.add_model_config(os.environ["TEST_MODEL_CONFIGS"])
    sys.exit(main(sys.argv[1:]))
