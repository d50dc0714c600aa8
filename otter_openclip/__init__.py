"""OTTER, optimal transport distillation for CLIP (ICLR 2022), as a plugin of open_clip."""

from pathlib import Path

import open_clip

from otter_openclip.losses import DistillationLoss, LabelSmoothingLoss, OtterLoss
from otter_openclip.sinkhorn import sinkhorn
from otter_openclip.teacher import EmaTeacher

__version__ = "0.1.0"
__all__ = ["DistillationLoss", "EmaTeacher", "LabelSmoothingLoss", "OtterLoss", "sinkhorn"]

open_clip.add_model_config(Path(__file__).parent / "model_configs")
