"""``--val``: mean average precision of heads on labelled pictures, which are encoded once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from clip_benchmark.datasets.builder import build_wds_dataset
from torch import Tensor

from otter_openclip.closed_form.heads import Heads
from otter_openclip.closed_form.two_towers import Towers
from otter_openclip.evaluation.labelled_images import LabelledImages
from otter_openclip.evaluation.metrics import multilabel_metrics
from otter_openclip.evaluation.prompts import class_prompts
from otter_openclip.frozen.encode import fill


class LabelledFeatures:
    """What both towers give for the pictures and the classes' prompts of a labelled webdataset."""

    def __init__(self, folder: str, towers: Towers, **how: Any) -> None:
        """``folder`` is of ``check_webdataset``; ``how`` is of ``frozen.encode.fill``.

        Raises:
            ValueError: naming what of the folder cannot be used.
        """
        images = towers.images
        dataset = build_wds_dataset("val", images.inputs.transform, "test", folder)
        prompts = class_prompts(dataset)
        shards = LabelledImages(dataset, images.inputs.transform).shards
        self.labels = shards.read_all()
        fill([images], shards.urls, **how)
        self.images = torch.from_numpy(images.files.whole(shards.urls)).float()
        self.counts = [len(group) for group in prompts]
        self.prompts = towers.text_features([text for group in prompts for text in group])

    def precision(self, heads: Heads) -> float:
        """Mean average precision under ``heads``."""
        return self.metrics(heads)["mean_average_precision"]

    def metrics(self, heads: Heads) -> dict[str, float]:
        """F@K and mean average precision under ``heads``, as ``otter-openclip eval`` computes them."""
        return multilabel_metrics(heads.images(self.images), self.classes(heads), self.labels)

    def classes(self, heads: Heads) -> Tensor:
        """(C, D) unit-norm features of the classes, each the mean of its prompts'."""
        each = heads.texts(self.prompts).split(self.counts)
        return F.normalize(torch.stack([part.mean(dim=0) for part in each]), dim=1)
