"""The two pretrained towers of a model, and what they give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from otter_openclip.cli import USER_ERRORS
from otter_openclip.frozen.loader import image_column, text_column
from otter_openclip.frozen.prefix import inner_parts, install

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
        except USER_ERRORS as error:
            reason = str(error).partition(". ")[0]  # the names of all models follow
            raise ValueError(f"--model {name}: {reason}") from error
        _check(model, name)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(place)
        self.config = open_clip.get_model_config(place)
        parts = inner_parts(model)
        install(model, parts)
        precision = precision or ("fp32" if self.device.type == "cpu" else "amp")
        how = {"device": self.device, "precision": precision}
        self.images = image_column(model, parts["visual"], folder, transform, **how)
        self.texts = text_column(model, parts["text"], folder, self.tokenizer, **how)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(n, width) of n texts, in float32 on the CPU."""
        batches = [texts[i : i + _TEXTS] for i in range(0, len(texts), _TEXTS)]
        return torch.cat([self.texts.encode(self.tokenizer(each)).float() for each in batches])


def _check(model: nn.Module, name: str) -> None:
    """Raise ValueError unless both towers of ``model``, called ``name``, can have a head of ours."""
    visual, text = getattr(model, "visual", None), getattr(model, "text", None)
    if not isinstance(visual, TimmModel) or not isinstance(text, HFTextEncoder):
        raise ValueError(
            f"--model {name} is not two pretrained towers, timm's and Hugging Face's; put two together "
            "with otter-openclip towers"
        )
    kinds = (nn.Linear, nn.Identity, nn.Dropout)
    image_head = [*visual.head.children()]
    if not all(isinstance(part, kinds) for part in image_head) or visual.trunk.num_classes:
        raise ValueError(f"--model {name}: its image tower has no linear head to replace")
    if not isinstance(text.proj, kinds):
        raise ValueError(f"--model {name}: its text tower has no linear head to replace")
