"""What a frozen prefix gives for images and tokens, written to a store; and what that depends on."""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from otter_openclip.cli import as_list
from otter_openclip.frozen import prefix
from otter_openclip.frozen.samples import ShardSamples, TableSamples
from otter_openclip.frozen.store import FeatureStore

BF16_TOLERANCE = 1e-2
ROUND = 30.0  # seconds of encoding after which what is done is on the disk
_BATCH = {"cpu": 64}
_BATCH_ELSEWHERE = 256
_TRIAL = 32  # inputs on which bfloat16 is compared with float32
_NOT_OF_THE_TOWER = ("_name_or_path", "transformers_version")
_NOT_OF_THE_OUTPUT = re.compile("^training$|checkpointing$")
_PLAIN = (bool, int, float, str, type(None))

# Keys; images (N * views, 3, H, W) or tokens (N, context); whether each could be read.
Batch = tuple[list[bytes], Tensor, list[bool]]


class NoRoomError(OSError):
    """The disk cannot take what is still to be encoded."""


def fingerprint(model: nn.Module, tower: str, name: str, *further: Any) -> str:
    """Digest of the prefix ``name`` of ``tower``, weights and architecture, and of ``further``."""
    found = hashlib.blake2b(digest_size=16)
    owner, module = getattr(model, tower), model.get_submodule(name)
    config = owner.config.to_dict() if hasattr(owner, "config") else {}  # Hugging Face's
    config = {key: value for key, value in config.items() if key not in _NOT_OF_THE_TOWER}
    timm = (getattr(module, "pretrained_cfg", None) or {}).get("architecture")
    for part in (
        name,
        module,
        getattr(owner, "pooler", None),
        timm,
        sorted(config.items()),
        *_settings(module),
        *further,
    ):
        # Functions and objects without a representation of their own show where they are.
        found.update(re.sub(r" at 0x[0-9a-f]+", "", f"{part}\n").encode())
    for key, value in {**dict(module.named_buffers()), **module.state_dict()}.items():
        found.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        found.update(memoryview(flat.numpy()))
    return found.hexdigest()


def _settings(module: nn.Module) -> Iterator[str]:
    """Plain attributes of all its parts: heads, pooling and the like show in no weight."""
    for name, part in module.named_modules():
        for key, value in sorted(vars(part).items()):
            plain = all(isinstance(x, _PLAIN) for x in as_list(value))
            if plain and not key.startswith("_") and not _NOT_OF_THE_OUTPUT.search(key):
                yield f"{name} {key} {value!r}"


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and check is not None and check()


class Encoder:
    """Runs the prefix of one tower, in eval mode and without gradients."""

    def __init__(
        self,
        model: nn.Module,
        tower: str,
        name: str,
        device: torch.device,
        autocast: Callable[[], contextlib.AbstractContextManager],
        input_dtype: torch.dtype | None,
    ) -> None:
        """``autocast`` and ``input_dtype`` as open_clip's loop has them for ``--precision``."""
        self.model, self.tower, self.name = model, tower, name
        self.device, self.autocast, self.input_dtype = device, autocast, input_dtype

    @property
    def batch_size(self) -> int:
        """Inputs that run at once."""
        return _BATCH.get(self.device.type, _BATCH_ELSEWHERE)

    @torch.no_grad()
    def __call__(self, given: Tensor) -> Tensor:
        """(N, width) features, on the CPU, of images (N, 3, H, W) or tokens (N, context).

        Raises:
            ValueError: if one of them is not finite.
        """
        module = self.model.get_submodule(self.name)
        was_training = module.training
        module.eval()
        try:
            dtype = self.input_dtype if given.is_floating_point() else None
            given = given.to(device=self.device, dtype=dtype)
            with self.autocast():
                features = prefix.run(self.model, self.tower, given)
        finally:
            module.train(was_training)
        if features.ndim != 2:
            raise ValueError(
                f"{self.name} gives features of shape {tuple(features.shape)}; only one vector a sample "
                "can be kept"
            )
        if not features.isfinite().all():
            raise ValueError(
                f"{self.name} gives features that are not finite; check its weights, or use --precision "
                "fp32"
            )
        return features.cpu()

    def in_bfloat16(self) -> Encoder:
        """The same, with autocast to bfloat16."""
        autocast = lambda: torch.autocast(self.device.type, torch.bfloat16)  # noqa: E731
        return Encoder(self.model, self.tower, self.name, self.device, autocast, None)

    def bfloat16_error(self, given: Tensor) -> float:
        """Largest relative distance between features in bfloat16 and these, of a few inputs."""
        given = given[:_TRIAL]
        exact, found = self(given).float(), self.in_bfloat16()(given).float()
        return float(((found - exact).norm(dim=1) / exact.norm(dim=1)).max())


class _Images(IterableDataset):
    """Batches of transformed images that a store has not, of some parts of the data."""

    def __init__(
        self,
        samples: ShardSamples | TableSamples,
        parts: list[Any],
        missing: np.ndarray,
        transform: Callable[[Image.Image], Tensor],
        views: int,
        batch_size: int,
    ) -> None:
        self.samples, self.parts, self.missing = samples, parts, missing
        self.transform, self.views, self.batch_size = transform, views, batch_size

    def __iter__(self) -> Iterator[Batch]:
        """Each batch; an unreadable image is a black one in it."""
        info = get_worker_info()
        parts = self.parts if info is None else self.parts[info.id :: info.num_workers]
        seen: set[bytes] = set()
        keys, images, readable = [], [], []
        for part in parts:
            for key, image in self.samples.images(part, lambda k: k not in seen and self._lacks(k)):
                seen.add(key)
                keys.append(key)
                readable.append(image is not None)
                images += self._views(key, Image.new("RGB", (64, 64)) if image is None else image)
                if len(keys) == self.batch_size:
                    yield keys, torch.stack(images), readable
                    keys, images, readable = [], [], []
        if keys:
            yield keys, torch.stack(images), readable

    def _lacks(self, key: bytes) -> bool:
        at = np.searchsorted(self.missing, np.array(key, self.missing.dtype))
        return bool(at < len(self.missing) and self.missing[at] == key.rstrip(b"\0"))

    def _views(self, key: bytes, image: Image.Image) -> list[Tensor]:
        if self.views == 1:
            return [self.transform(image)]
        with _seeded(int.from_bytes(key[:8], "little") >> 1):
            return [self.transform(image) for _ in range(self.views)]


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of an image's views follow from the image; those of the process go on after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed), np.random.seed(seed % 2**32), torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])


class ImageInputs:
    """Images for an encoder, read by worker processes."""

    def __init__(
        self,
        samples: ShardSamples | TableSamples,
        transform: Callable[[Image.Image], Tensor],
        views: int,
    ) -> None:
        """``transform`` gives (3, H, W); several views are random, by numbers of each image's own."""
        self.samples, self.transform, self.views = samples, transform, views

    def batches(
        self, missing: np.ndarray, share: slice, batch_size: int, workers: int
    ) -> Iterable[Batch]:
        """Of a share of the data's parts, the images whose digests are in ``missing`` (M,), sorted."""
        parts = self.samples.parts[share]
        found = _Images(self.samples, parts, missing, self.transform, self.views, batch_size)
        return DataLoader(found, batch_size=None, num_workers=min(workers, len(parts)))


class TokenInputs:
    """Tokens for an encoder."""

    views = 1

    def __init__(self, keys: np.ndarray, tokens: np.ndarray) -> None:
        """``tokens`` (N, context) of the digests ``keys`` (N,)."""
        self.keys, first = np.unique(keys, return_index=True)
        self.tokens = tokens[first]

    def batches(
        self, missing: np.ndarray, share: slice, batch_size: int, workers: int
    ) -> Iterable[Batch]:
        """A share of the digests ``missing`` (M,)."""
        keys = missing[share]
        tokens = self.tokens[np.searchsorted(self.keys, keys)]
        for start in range(0, len(keys), batch_size):
            names = _bytes(keys[start : start + batch_size])
            given = torch.from_numpy(tokens[start : start + batch_size]).long()
            yield names, given, [True] * len(names)


def _bytes(keys: np.ndarray) -> list[bytes]:
    whole = keys.tobytes()
    return [whole[i : i + 16] for i in range(0, len(whole), 16)]


def encode(
    encoder: Encoder, batches: Iterable[Batch], store: FeatureStore, bar: tqdm, views: int = 1
) -> Iterator[None]:
    """Add to ``store`` what the encoder gives, some :data:`ROUND` seconds' worth between two yields.

    Raises:
        ValueError: if the encoder gives NaN or infinities, which would pass for an unreadable image.
        NoRoomError: after the first batch, if the disk cannot take what ``bar.total`` says is to come.
        OSError: if it cannot be written.
    """
    keys: list[bytes] = []
    rows: list[Tensor] = []
    began = time.monotonic()
    for names, given, readable in batches:
        features = encoder(given).view(len(names), views, -1)
        good = torch.tensor(readable)
        if bad := int((~features[good].isfinite().all(dim=-1)).any(dim=-1).sum()):
            raise ValueError(
                f"the {encoder.tower} tower gives NaN or infinities for {bad} of {len(names)} samples; "
                "is its checkpoint whole? With --precision amp or fp16 use fp32"
            )
        features[~good] = torch.nan
        if not rows:
            _check_room(store, (bar.total - bar.n) * features[0].nbytes)
        keys += names
        rows.append(features)
        bar.update(len(names))
        if time.monotonic() - began > ROUND:
            store.add(keys, torch.cat(rows))
            keys, rows = [], []
            yield
            began = time.monotonic()
    if rows:
        store.add(keys, torch.cat(rows))


def _check_room(store: FeatureStore, needed: int) -> None:
    free = shutil.disk_usage(store.folder).free
    if free < needed:
        raise NoRoomError(f"features need {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} are free")
