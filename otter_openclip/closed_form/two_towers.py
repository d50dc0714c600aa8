"""The two pretrained towers of a model, and what they give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from torch import Tensor

from otter_openclip.closed_form.headed_model import check_towers
from otter_openclip.frozen.loader import image_column, text_column
from otter_openclip.frozen.prefix import inner_parts, install
from otter_openclip.model_folders.folder import PROBE_TEXTS

_TEXTS = 256  # that are encoded at a time


class Towers:
    """The two pretrained towers, and the columns that keep what they give."""

    def __init__(
        self, name: str, folder: Path, precision: str | None = None, device: str | None = None
    ) -> None:
        """Load the model ``name``; ValueError if it is not two towers.

        By default the device is a GPU if there is one, and the precision fp32 on a CPU, else amp.
        """
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        place = f"local-dir:{name}" if Path(name).is_dir() else name
        try:
            model, _, transform = open_clip.create_model_and_transforms(place, device=self.device)
        except RuntimeError as error:  # open_clip's own of an unknown model
            reason = str(error).partition(". ")[0]  # the names of all models follow
            raise ValueError(f"--model {name}: {reason}") from error
        check_towers(model, name)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(place)
        self.config = open_clip.get_model_config(place)
        parts = inner_parts(model)
        install(model, parts)
        precision = precision or ("fp32" if self.device.type == "cpu" else "amp")
        how = {"device": self.device, "precision": precision}
        self.images = image_column(model, parts["visual"], folder, transform, **how)
        self.texts = text_column(model, parts["text"], folder, self.tokenizer, **how)

    def probes(self) -> Tensor:
        """Tokens of some texts."""
        return self.tokenizer(PROBE_TEXTS)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(n, width) of n texts, in float32 on the CPU."""
        batches = [texts[i : i + _TEXTS] for i in range(0, len(texts), _TEXTS)]
        return torch.cat([self.texts.encode(self.tokenizer(each)).float() for each in batches])
