"""The model, and its features of pairs as they stream past; else only thumbnails of them stay."""

from __future__ import annotations

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
from otter_openclip.cli import USER_ERRORS
from otter_openclip.frozen.loader import image_column, text_column
from otter_openclip.frozen.prefix import inner_parts, install
from otter_openclip.frozen.store import FeatureFiles
from otter_openclip.pages import thumbnail

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
    """An open_clip model; ``name`` may also be a folder that ``export`` or ``towers`` wrote."""
    if Path(name).is_dir():
        name = f"{LOCAL_DIR_PREFIX}{name}"
    if pretrained and ":" in name:
        raise ValueError(
            f"--model {name} brings its own weights, --pretrained {pretrained} would be ignored; "
            "export the checkpoint (otter-openclip export) and give that folder as --model"
        )
    if ":" not in name and not pretrained:
        raise ValueError(
            f"--model {name} without --pretrained has random weights; pass a tag, a checkpoint's file, "
            "or a folder as --model"
        )
    try:
        network, _, transform = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, device=device
        )
    except USER_ERRORS as error:
        raise ValueError(f"--model {name}: {error}") from error
    return Model(network.eval(), transform, open_clip.get_tokenizer(name), device)


def _feature_files(model: Model, folder: str | None) -> dict[str, FeatureFiles]:
    """Tower -> where training runs keep what it gives; ``model`` takes that for inputs from now on."""
    if folder is None:
        return {}
    network, place, device = model.network, Path(folder), torch.device(model.device)
    names = inner_parts(network)
    install(network, names)
    makers = {"visual": (image_column, model.transform), "text": (text_column, model.tokenizer)}
    files = {}
    for tower, name in names.items():
        column, inputs = makers[tower]
        files[tower] = column(network, name, place, inputs, device=device).files
    return files


def _features(files: FeatureFiles | None, pairs: list[Pair]) -> Tensor | None:
    """What the ``files`` have of the ``pairs``; None unless they have all of their shards."""
    shards = {pair.shard for pair in pairs}
    if files is None or not all(map(os.path.exists, shards)) or files.missing(list(shards)):
        return None
    rows = [files.read(pair.shard)[pair.index, 0] for pair in pairs]
    return torch.from_numpy(np.stack(rows)).float()


@torch.no_grad()
def embed(model: Model, pairs: Iterable[Pair], total: int, folder: str | None = None) -> Embedded:
    """Encode ``pairs``; ``total`` is how many there are at most, ``folder`` a ``--feature-cache``.

    Raises:
        ValueError: if features are not finite.
    """
    files = _feature_files(model, folder)
    images, texts, reused = [], [], 0
    shown: list[tuple[Any, ...]] = []
    pairs = iter(pairs)
    with tqdm(total=total, desc="Encoding pairs", unit="pair") as bar:
        while batch := list(itertools.islice(pairs, _BATCH)):
            pixels, tokens = (_features(files.get(tower), batch) for tower in ("visual", "text"))
            reused += len(batch) * sum(x is not None for x in (pixels, tokens))
            if pixels is None:
                pixels = torch.stack([model.transform(pair.image) for pair in batch])
            if tokens is None:
                tokens = model.tokenizer([pair.caption for pair in batch])
            images.append(model.network.encode_image(pixels.to(model.device), True).float().cpu())
            texts.append(model.network.encode_text(tokens.to(model.device), True).float().cpu())
            if not (images[-1].isfinite().all() and texts[-1].isfinite().all()):
                raise ValueError("the model gives features that are not finite; check its weights")
            shown += [
                (pair.caption, thumbnail(pair.image), pair.digest, f"{pair.shard}: {pair.key}")
                for pair in batch
            ]
            bar.update(len(batch))
    if folder is not None:
        print(f"{reused} of {2 * len(shown)} features are those of {folder}")
    return Embedded(torch.cat(images), torch.cat(texts), *map(list, zip(*shown, strict=True)))
