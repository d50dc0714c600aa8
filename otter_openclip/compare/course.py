"""What checkpoints give on a test set: the frozen towers run once, then only the heads change."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from clip_benchmark.datasets.builder import build_wds_dataset
from PIL import Image
from torch import Tensor

from otter_openclip.evaluation import multilabel_metrics
from otter_openclip.evaluation.classifier import class_features
from otter_openclip.evaluation.labelled_images import LabelledImages, encode_images
from otter_openclip.evaluation.prompts import class_prompts
from otter_openclip.evaluation.validator import check_webdataset
from otter_openclip.frozen import prefix

KS = (1, 5, 10)
SPLIT = "test"


class Towers:
    """A towers folder's model, locked as in training; heads of checkpoints are put on it.

    It takes the place of a tokenizer in ``class_features``, giving what the frozen part gives. A text
    is encoded once.
    """

    def __init__(self, folder: Path) -> None:
        """Load them with stock open_clip."""
        name = f"local-dir:{folder}"
        self.model, _, self.transform = open_clip.create_model_and_transforms(name)
        self.model.lock_image_tower()
        self.model.lock_text_tower(freeze_layer_norm=True)
        self.model.eval()
        self._tokenizer = open_clip.get_tokenizer(name)
        self._prefixes = prefix.find_prefixes(self.model)
        prefix.install(self.model, self._prefixes)
        self._known: dict[str, Tensor] = {}

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, F) of the frozen trunk for images."""
        return prefix.run(self.model, "visual", images)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, F) of the frozen text tower."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            rows = prefix.run(self.model, "text", self._tokenizer(new))
            self._known.update(zip(new, rows, strict=True))
        return torch.stack([self._known[text] for text in texts])

    def put_on(self, checkpoint: Path, weights: str = "state_dict") -> None:
        """Take the heads of a training checkpoint, by ``weights`` the student's or the teacher's."""
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        frozen = tuple(f"{name}." for name in self._prefixes.values())
        heads = {k: v for k, v in saved[weights].items() if not k.startswith(frozen)}
        self.model.load_state_dict(heads, strict=False)


class Example(NamedTuple):
    """A test picture, by its number, with the names of its classes."""

    number: int
    picture: Image.Image
    names: list[str]


class TestSet:
    """A multi-label or single-label clip_benchmark webdataset."""

    def __init__(self, folder: Path, flag: str) -> None:
        """Check and open it.

        Raises:
            ValueError: naming ``flag``, by which it was given, if it cannot be used.
        """
        self.multilabel = check_webdataset(str(folder), SPLIT, flag=flag).suffix == "npy"
        self.folder = folder
        dataset = self._open(None)
        self.prompts, self.classes = class_prompts(dataset), dataset.classes
        self._images = LabelledImages(dataset, None)
        try:
            self._images.shards.read_all()
        except ValueError as error:
            raise ValueError(f"{flag} {folder} cannot be used: {error}") from error

    def _open(self, transform: Any) -> Any:
        return build_wds_dataset(self.folder.name, transform, SPLIT, str(self.folder))

    def encode(self, towers: Towers) -> None:
        """Run the frozen towers over the pictures and the class names."""
        self._images.transform = towers.transform
        given = towers.model, self._images
        encode = towers.encode_image
        self._features, self._labels = encode_images(*given, device="cpu", encode=encode)
        class_features(towers.model, towers, self.prompts, device="cpu")

    def _scored(self, towers: Towers) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            images = towers.model.encode_image(self._features, normalize=True)
        given = towers.model, towers, self.prompts
        return images, class_features(*given, device="cpu", progress=False)

    def metrics(self, towers: Towers) -> dict[str, float]:
        """F@K and mAP with the heads that ``towers`` has on."""
        return multilabel_metrics(*self._scored(towers), self._labels, KS)

    def examples(self, count: int, seed: int) -> list[Example]:
        """Some of the first pictures, by lot."""
        among = min(len(self._labels), 500)
        numbers = sorted(random.Random(seed).sample(range(among), min(count, among)))
        pictures = [image for image, _ in islice(self._open(lambda image: image), numbers[-1] + 1)]
        return [
            Example(n, pictures[n].convert("RGB"), [self.classes[c] for c in self._labels[n]])
            for n in numbers
        ]

    def nearest(self, towers: Towers, numbers: Sequence[int], count: int) -> list[list[str]]:
        """The names of each picture's nearest classes."""
        images, classes = self._scored(towers)
        order = (images[list(numbers)] @ classes.T).argsort(dim=1, descending=True)
        return [[self.classes[c] for c in row[:count]] for row in order.tolist()]


def pair_features(
    towers: Towers, pictures: Sequence[Image.Image], texts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """(N, D) unit-norm features of pairs, images' and texts', with the heads that are on."""
    given = torch.stack([towers.transform(picture) for picture in pictures])
    with torch.no_grad():
        images = towers.model.encode_image(towers.encode_image(given), normalize=True)
        return images, towers.model.encode_text(towers(texts), normalize=True)
