"""The model, and its features of pairs as they stream past; else only thumbnails of them are kept."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from open_clip.factory import LOCAL_DIR_PREFIX
from torch import Tensor, nn
from tqdm import tqdm

from otter_openclip.analysis.reading import Pair, thumbnail
from otter_openclip.frozen import prefix
from otter_openclip.frozen.encoding import fingerprint
from otter_openclip.frozen.store import DIGEST, FeatureStore, digest
from otter_openclip.model_folders.folder import CONFIG_FILE
from otter_openclip.model_folders.parts import check_moved

_BATCH = 64
_KINDS = {"visual": "image", "text": "text"}  # of a feature cache's folders


class Embedded(NamedTuple):
    """N pairs: unit-norm features (N, D), in float32 on the CPU, and what is shown of the pairs."""

    images: Tensor
    texts: Tensor
    captions: list[str]
    thumbnails: list[bytes]
    keys: list[bytes]
    places: list[str]


class Model:
    """An open_clip model that encodes pairs, with what a ``--feature-cache`` has of them."""

    def __init__(
        self, name: str, pretrained: str | None, device: str, cache: str | None = None
    ) -> None:
        """Load the model; ``name`` may also be a folder that ``export`` or ``towers`` wrote.

        Raises:
            ValueError: if there is no such model, it has no weights, or nothing of ``cache`` is its own.
        """
        if Path(name, CONFIG_FILE).is_file():
            name = f"{LOCAL_DIR_PREFIX}{name}"
        elif Path(name).exists() and not pretrained:
            raise ValueError(
                f"--model {name} is no folder that export or towers wrote; make one of a training run's "
                f"checkpoint with otter-openclip export {name} OUT"
            )
        check_moved(name)
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
            self.model, _, self.transform = open_clip.create_model_and_transforms(
                name, pretrained=pretrained, device=device
            )
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # files, network, no such name or tag: of many types
            reason = " ".join(str(error).split()) or type(error).__name__
            given = f"--model {name}" + f" --pretrained {pretrained}" * bool(pretrained)
            raise ValueError(f"{given} cannot be loaded: {reason[:300]}") from error
        self.model.eval().requires_grad_(False)
        self.device = device
        self.stores = self._stores(Path(cache)) if cache else {}
        self.cached = {tower: 0 for tower in self.stores}
        if cache and not self.stores:
            raise ValueError(
                f"--feature-cache {cache} has no features of this model's frozen towers; drop the flag, "
                "or name the model and the cache of one training run"
            )

    def _stores(self, cache: Path) -> dict[str, FeatureStore]:
        """The folders of ``cache`` that hold what a frozen part of this model gives, by tower."""
        found: dict[str, tuple[str, FeatureStore]] = {}
        for tower, kind in _KINDS.items():
            for about in cache.glob(f"{kind}-*/about.json"):
                try:
                    said = json.loads(about.read_text(encoding="utf-8"))
                    parts: dict[str, Any] = {key: str(said[key]) for key in ("prefix", "precision")}
                except (ValueError, KeyError, TypeError, OSError) as error:
                    logging.warning(f"{about} cannot be read, its features are left out: {error!r}")
                    continue
                if kind == "image":
                    parts |= {"transform": self.transform, "views": 1}
                owner = getattr(self.model, tower, None)
                if not isinstance(owner, nn.Module) or not _has(self.model, parts["prefix"]):
                    continue
                key = fingerprint(self.model, tower, parts["prefix"], *sorted(parts.items()))
                if about.parent.name == f"{kind}-{key}":
                    found[tower] = parts["prefix"], FeatureStore(about.parent)
        prefix.install(self.model, {tower: name for tower, (name, _) in found.items()})
        return {tower: store for tower, (_, store) in found.items()}

    @torch.no_grad()
    def _encode(self, tower: str, keys: list[bytes], given: list[Any]) -> Tensor:
        """(B, D) features; of ``given`` only those that the cache has not are made into inputs."""
        rows = np.full(len(keys), -1)
        if store := self.stores.get(tower):
            rows = store.find(np.array(keys, DIGEST))
        encode = self.model.encode_image if tower == "visual" else self.model.encode_text
        missing, features = np.flatnonzero(rows < 0), None
        parts = []
        if len(missing):
            inputs = [given[i] for i in missing]
            inputs = [self.transform(x) for x in inputs] if tower == "visual" else inputs
            parts.append((missing, torch.stack(inputs)))
        if len(hits := np.flatnonzero(rows >= 0)):
            self.cached[tower] += len(hits)
            parts.append((hits, store.take(rows[hits]).float()))
        for where, inputs in parts:
            out = encode(inputs.to(self.device), normalize=True).float().cpu()
            features = out.new_empty(len(keys), out.shape[1]) if features is None else features
            features[torch.from_numpy(where)] = out
        if not features.isfinite().all():
            raise ValueError("the model gives features that are not finite; check its weights")
        return features

    def embed(self, pairs: Iterable[Pair], total: int) -> Embedded:
        """Encode ``pairs``; ``total`` is how many there are at most.

        Raises:
            ValueError: if features are not finite.
        """
        features: tuple[list[Tensor], list[Tensor]] = ([], [])
        shown: list[tuple[str, bytes, bytes, str]] = []
        pairs = iter(pairs)
        with tqdm(total=total, desc="Encoding pairs", unit="pair") as bar:
            while batch := list(itertools.islice(pairs, _BATCH)):
                tokens = self.tokenizer([pair.caption for pair in batch])
                keys = [digest(row.numpy().astype("<i4").tobytes()) for row in tokens]
                images = [pair.image for pair in batch]
                features[0].append(self._encode("visual", [pair.key for pair in batch], images))
                features[1].append(self._encode("text", keys, list(tokens)))
                shown += [(p.caption, thumbnail(p.image), p.key, p.place) for p in batch]
                bar.update(len(batch))
        images, texts = map(torch.cat, features)
        return Embedded(images, texts, *map(list, zip(*shown, strict=True)))


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
