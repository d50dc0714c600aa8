"""The model, and its features of pairs as they stream past; else only thumbnails of them stay."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from open_clip.factory import LOCAL_DIR_PREFIX
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from otter_openclip.analysis.reading import Pair
from otter_openclip.frozen.encode import Column
from otter_openclip.frozen.loader import image_column, text_column
from otter_openclip.frozen.prefix import inner_parts, install

THUMBNAIL = 160  # pixels along the longer side
_BATCH = 64


class Embedded(NamedTuple):
    """N pairs: unit-norm features (N, D), in float32 on the CPU, and what is shown of the pairs."""

    images: Tensor
    texts: Tensor
    captions: list[str]
    thumbnails: list[bytes]
    digests: list[bytes]
    places: list[str]


class Model(NamedTuple):
    """A model in eval mode, with what makes its inputs."""

    network: nn.Module
    transform: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: str


def load_model(name: str, pretrained: str | None, device: str) -> Model:
    """An open_clip model; ``name`` may also be a folder that ``export`` or ``towers`` wrote.

    Raises:
        ValueError: if there is no such model, or it has no weights.
    """
    if Path(name).is_dir():
        name = f"{LOCAL_DIR_PREFIX}{name}"
    if pretrained and ":" in name:
        raise ValueError(
            f"--model {name} brings its own weights, --pretrained {pretrained} would be ignored; "
            "export the checkpoint (otter-openclip export) and give that folder as --model"
        )
    if ":" not in name and not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"--model {name} without --pretrained has random weights; pass a tag ({tags}), a "
            "checkpoint's file, or a folder as --model"
        )
    try:
        network, _, transform = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, device=device
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # Of files, the network, names and tags: of many types.
        reason = " ".join(str(error).split()) or type(error).__name__
        weights = f" --pretrained {pretrained}" if pretrained else ""
        raise ValueError(f"--model {name}{weights} cannot be loaded: {reason[:300]}") from error
    return Model(network.eval(), transform, tokenizer, device)


class _Inputs:
    """Inputs of the towers: what frozen ones gave in a training run, as far as that is kept."""

    def __init__(self, model: Model, folder: str | None) -> None:
        self.model, self.reused = model, 0
        self.columns: dict[str, Column] = {}
        if folder is None:
            return
        names = inner_parts(model.network)
        install(model.network, names)
        path, device = Path(folder), torch.device(model.device)
        if "visual" in names:
            column = image_column(
                model.network, names["visual"], path, model.transform, device=device
            )
            self.columns["visual"] = column
        if "text" in names:
            column = text_column(model.network, names["text"], path, model.tokenizer, device=device)
            self.columns["text"] = column

    def images(self, pairs: list[Pair]) -> Tensor:
        """Features, or transformed images."""
        features = self._kept("visual", pairs)
        if features is not None:
            return features
        return torch.stack([self.model.transform(pair.image) for pair in pairs])

    def texts(self, pairs: list[Pair]) -> Tensor:
        """Features, or tokens."""
        features = self._kept("text", pairs)
        if features is not None:
            return features
        return self.model.tokenizer([pair.caption for pair in pairs])

    def _kept(self, tower: str, pairs: list[Pair]) -> Tensor | None:
        if tower not in self.columns:
            return None
        files = self.columns[tower].files
        shards = {pair.shard for pair in pairs}
        if not all(os.path.exists(shard) for shard in shards) or files.missing(list(shards)):
            return None
        features = {shard: files.read(shard) for shard in shards}
        rows = np.stack([features[pair.shard][pair.index, 0] for pair in pairs])
        self.reused += len(pairs)
        return torch.from_numpy(rows).float()


@torch.no_grad()
def embed(model: Model, pairs: Iterable[Pair], total: int, folder: str | None = None) -> Embedded:
    """Encode ``pairs``; ``total`` is how many there are at most, ``folder`` a ``--feature-cache``.

    Raises:
        ValueError: if features are not finite.
    """
    inputs = _Inputs(model, folder)
    images, texts = [], []
    shown: list[tuple[Any, ...]] = []
    pairs = iter(pairs)
    with tqdm(total=total, desc="Encoding pairs", unit="pair") as bar:
        while batch := list(itertools.islice(pairs, _BATCH)):
            pixels, tokens = (
                x.to(model.device) for x in (inputs.images(batch), inputs.texts(batch))
            )
            images.append(model.network.encode_image(pixels, True).float().cpu())
            texts.append(model.network.encode_text(tokens, True).float().cpu())
            if not (images[-1].isfinite().all() and texts[-1].isfinite().all()):
                raise ValueError("the model gives features that are not finite; check its weights")
            shown += [
                (pair.caption, _thumbnail(pair.image), pair.digest, f"{pair.shard}: {pair.key}")
                for pair in batch
            ]
            bar.update(len(batch))
    if folder is not None:
        print(f"{inputs.reused} of {2 * bar.n} features are those of {folder}")
    return Embedded(torch.cat(images), torch.cat(texts), *map(list, zip(*shown, strict=True)))


def _thumbnail(image: Image.Image) -> bytes:
    """A small JPEG of an RGB image."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer := io.BytesIO(), "JPEG", quality=78)
    return buffer.getvalue()
