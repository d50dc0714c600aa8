"""Fill a store with one tower's features: which precision, which folder, all ranks together."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.distributed as dist
from open_clip_train.distributed import broadcast_object
from open_clip_train.precision import get_autocast
from torch import nn
from tqdm import tqdm

from otter_openclip.files import write_json
from otter_openclip.frozen.encoding import (
    BF16_TOLERANCE,
    Encoder,
    ImageInputs,
    TokenInputs,
    encode,
    fingerprint,
    has_bfloat16,
)
from otter_openclip.frozen.store import FeatureStore

_ABOUT = "about.json"
_DONE = object()


class Tower:
    """The frozen prefix of one tower, with the folder its features are kept in."""

    def __init__(
        self, args: Namespace, model: nn.Module, tower: str, prefix: str, further: dict[str, Any]
    ) -> None:
        """``further`` is what the features also depend on, by name."""
        device = torch.device(args.device)
        autocast = get_autocast(args.precision, device_type=device.type)
        dtype = open_clip.get_input_dtype(args.precision)
        self._encoder = Encoder(model, tower, prefix, device, autocast, dtype)
        self._args = args
        self._kind = {"visual": "image", "text": "text"}[tower]
        self._about = {"prefix": prefix, "precision": args.precision, **further}

    def _open(self) -> FeatureStore:
        encoder = self._encoder
        parts = sorted(self._about.items())
        key = fingerprint(encoder.model, encoder.tower, encoder.name, *parts)
        return FeatureStore(Path(self._args.feature_cache) / f"{self._kind}-{key}")

    def filled(self, keys: np.ndarray, inputs: ImageInputs | TokenInputs) -> FeatureStore:
        """The store, with features of all digests ``keys`` (N,), sorted and unique.

        Raises:
            ValueError: if the prefix cannot be used, or the data changed meanwhile.
            OSError: if the folder cannot be written.
        """
        args, kind = self._args, self._kind
        precision = self._precision(keys, inputs)
        store = self._open()
        missing = keys[store.find(keys) < 0]
        logging.info(
            f"Feature cache: of {len(keys)} {kind} features {len(keys) - len(missing)} are in "
            f"{store.folder}"
            + (f", {len(missing)} to encode in {precision}" if len(missing) else "")
        )
        if not len(missing):
            return store
        if args.rank == 0:
            write_json(store.folder / _ABOUT, {k: str(v) for k, v in self._about.items()})
        share = slice(args.rank, None, args.world_size)
        batches = inputs.batches(missing, share, self._encoder.batch_size, args.workers)
        total = -(-len(missing) // args.world_size)
        label = f"Encoding {kind}s"
        with tqdm(total=total, desc=label, unit=kind, disable=args.rank != 0) as bar:
            self._together(encode(self._encoder, batches, store, bar, inputs.views))
        store.refresh()
        if left := int((store.find(keys) < 0).sum()):
            raise ValueError(
                f"{left} {kind} features are not in {store.folder} although all were encoded: the data "
                "changed meanwhile, or the ranks do not share this folder; run it again"
            )
        return store

    def _together(self, work: Iterator[None]) -> None:
        """Ranks meet after every round: no collective waits for longer than that takes."""
        unfinished = True
        while unfinished:
            unfinished = next(work, _DONE) is not _DONE
            if self._args.world_size > 1:
                count = torch.tensor(int(unfinished), device=self._args.device)
                dist.all_reduce(count)
                unfinished = bool(count.item())

    def _precision(self, keys: np.ndarray, inputs: ImageInputs | TokenInputs) -> str:
        """What to encode in, in words; bfloat16 only where the features stay close enough."""
        args, encoder = self._args, self._encoder
        if args.precision != "fp32":
            return args.precision
        able = has_bfloat16(encoder.device)
        if args.feature_precision == "fp32":
            hint = "; --feature-precision bf16 may be faster here" if able else ""
            return f"float32{hint}"
        if not able:
            return f"float32: {encoder.device} has no instructions for bfloat16"
        error = self._bfloat16_error(keys, inputs) if args.rank == 0 else None
        if args.world_size > 1:
            error = broadcast_object(args, error)
        if error > BF16_TOLERANCE:
            return f"float32: in bfloat16 they are up to {error:.1%} off, more than 1%"
        self._encoder = encoder.in_bfloat16()
        self._about["precision"] = "bfloat16"
        return f"bfloat16: up to {error:.1%} off"

    def _bfloat16_error(self, keys: np.ndarray, inputs: ImageInputs | TokenInputs) -> float:
        """Measured on some of the inputs; infinite if all features are there in float32."""
        if (self._open().find(keys) >= 0).all():
            return float("inf")
        _, given, _ = next(iter(inputs.batches(keys, slice(None), self._encoder.batch_size, 0)))
        return self._encoder.bfloat16_error(given)
