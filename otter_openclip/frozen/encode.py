"""What frozen towers give for the samples of shards, made shard by shard and kept in ``store``'s files.

Ranks share out the shards, loader processes those of a rank. A shard's file is written when all of it is
encoded, so a run that was killed goes on with the next shard.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from open_clip import get_input_dtype
from open_clip_train.precision import get_autocast
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from otter_openclip.captions import cut_alike
from otter_openclip.frozen import prefix
from otter_openclip.frozen.store import FeatureFiles, in_half
from otter_openclip.shards import read

_PLAIN = (bool, int, float, str, type(None))
# Settings that change nothing of what a tower gives.
_IGNORED_SETTINGS = re.compile(
    "^_|^(name_or_path|training|transformers_version|dtype|torch_dtype)$|checkpointing$"
)


def fingerprint(settings: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> str:
    """A digest of plain settings and of tensors; lists and tuples of equal values are the same."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for key, value in (tensors or {}).items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()


def tower_fingerprint(model: nn.Module, tower: str, name: str, settings: Mapping[str, Any]) -> str:
    """A digest of the prefix ``name`` of ``tower``, its weights and build, and of ``settings``."""
    owner, module = getattr(model, tower), model.get_submodule(name)
    config = owner.config.to_dict() if hasattr(owner, "config") else {}  # Hugging Face's
    architecture = {
        "name": name,
        "module": str(module),
        "pooler": str(getattr(owner, "pooler", None)),
        "timm": (getattr(module, "pretrained_cfg", None) or {}).get("architecture"),
        "config": {k: v for k, v in config.items() if not _IGNORED_SETTINGS.search(k)},
        # Heads, pooling and the like show in no weight.
        "attributes": {part: _attributes(child) for part, child in module.named_modules()},
    }
    tensors = {**dict(module.named_buffers()), **module.state_dict()}
    return fingerprint({**architecture, **settings}, tensors)


def _attributes(module: nn.Module) -> dict[str, Any]:
    def is_plain(value: Any) -> bool:
        values = value if isinstance(value, list | tuple) else [value]
        return all(isinstance(each, _PLAIN) for each in values)

    named = vars(module).items()
    return {k: v for k, v in named if is_plain(v) and not _IGNORED_SETTINGS.search(k)}


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """What tokens depend on, as far as it shows: vocabulary, context, and how some texts are read."""
    inner = getattr(tokenizer, "tokenizer", None)
    vocabulary = inner.get_vocab() if hasattr(inner, "get_vocab") else {}
    texts = ["a photo of two dogs, running", "A Photo: CAFÉ déjà-vu  12.5 %", ""]
    return {
        "tokenizer": type(inner or tokenizer).__name__,
        "vocabulary": fingerprint(vocabulary),
        "tokens": tokenizer(texts).tolist(),
    }


class ImageInputs:
    """Reads images: (3, H, W) of a sample's files, and whether they are of a picture."""

    contents = True  # of a shard's files

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, files: Mapping[str, bytes]) -> tuple[Tensor, bool]:
        """A black image stands for one that is not there."""
        try:
            image = read.rgb(read.opened(read.image_file(files, read.TRAINING_IMAGES)))
        except read.SampleError as error:
            logging.warning(f"An image is left out: {error}")
            return self.transform(Image.new("RGB", (64, 64))), False
        return self.transform(image), True


class TokenInputs:
    """Reads captions: (context,) tokens of a sample's files, and whether they are of a text."""

    contents = ("txt",)

    def __init__(self, tokenizer: Callable[[list[str]], Tensor]) -> None:
        self.tokenizer = tokenizer

    def __call__(self, files: Mapping[str, bytes]) -> tuple[Tensor, bool]:
        """Of no UTF-8 text the tokens are those of an empty one."""
        try:
            return self.tokenizer([files["txt"].decode()])[0], True
        except (KeyError, UnicodeDecodeError):
            return self.tokenizer([""])[0], False


class Column:
    """One value a sample that is kept: an input as it is read, or what a frozen tower makes of it."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        key: str,
        inputs: ImageInputs | TokenInputs,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Keep it below ``folder``, in a folder named by ``kind`` and ``key``, a fingerprint."""
        self.kind, self.inputs, self.encode = kind, inputs, encode
        self.files = FeatureFiles(folder / f"{kind}-{key}")

    def rows(self, inputs: Tensor, good: Tensor) -> np.ndarray:
        """(samples, 1, width) of the inputs (samples, ...), those not ``good`` marked.

        Raises: ValueError if features are not finite.
        """
        if self.encode is None:
            rows = inputs.to(torch.int32)
            rows[~good] = -1
            return rows[:, None].numpy()
        features = self.encode(inputs)
        if features.ndim != 2 or not features.isfinite().all():
            raise ValueError(
                f"what the {self.kind} tower gives is no finite vector for each sample; check its "
                "weights and pooling, or use --precision fp32"
            )
        rows = features.float()
        rows[~good] = torch.nan
        return rows[:, None].numpy()


class TowerEncoder:
    """Runs the frozen prefix of one tower, in eval mode and without gradients."""

    def __init__(
        self, model: nn.Module, tower: str, name: str, device: torch.device, precision: str
    ) -> None:
        """``precision`` is open_clip's ``--precision``, with the autocast of its loop."""
        self.model, self.tower, self.name, self.device = model, tower, name, device
        self.autocast = get_autocast(precision, device_type=device.type)
        self.dtype = get_input_dtype(precision)

    def __call__(self, inputs: Tensor) -> Tensor:
        """(N, width) features, on the CPU, of images (N, 3, H, W) or tokens (N, context)."""
        self.model.get_submodule(self.name).eval()
        dtype = self.dtype if inputs.is_floating_point() else None
        with self.autocast():
            inputs = inputs.to(device=self.device, dtype=dtype)
            return prefix.run(self.model, self.tower, inputs).cpu()


class _Batches(IterableDataset):
    """(shard, (inputs, which are good)) of batches of shards; after a shard's last one (shard, None)."""

    def __init__(self, shards: Sequence[str], inputs: ImageInputs | TokenInputs, size: int) -> None:
        self.shards, self.inputs, self.size = shards, inputs, size

    def __iter__(self) -> Iterator[tuple[str, tuple[Tensor, Tensor] | None]]:
        info = get_worker_info()
        for shard in self.shards if info is None else self.shards[info.id :: info.num_workers]:
            samples = map(self.inputs, _samples(shard, self.inputs.contents))
            while batch := list(itertools.islice(samples, self.size)):
                inputs, good = zip(*batch, strict=True)
                yield shard, (torch.stack(inputs), torch.tensor(good))
            yield shard, None


def _samples(shard: str, contents: Any) -> Iterator[dict[str, bytes]]:
    """A shard's samples up to where it is damaged, as open_clip's loader reads them."""
    try:
        for _, files in read.samples(shard, contents=contents):
            yield files
    except OSError as error:
        logging.warning(f"{shard} {error}")


def fill(
    columns: Sequence[Column],
    shards: Sequence[str],
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> None:
    """Make what ``columns`` lack of ``shards``; all ranks call it. With nothing to do none is opened.

    Raises:
        ValueError: if a shard is no local file, two cannot be told apart, or features are not finite.
    """
    check_local(columns[0].files, shards)
    for column in columns:
        wanted = dict.fromkeys(column.files.missing(shards))
        logging.info(f"Features ({column.kind}): {len(wanted)} of {len(shards)} shards to encode")
        if rank == 0 and isinstance(column.inputs, TokenInputs):
            captions = read.first_captions(wanted)
            if remark := cut_alike("captions", captions, column.inputs.tokenizer):
                logging.warning(remark)
        # By place, and together in any case: a rank that looks later may find some files there already.
        mine = [shard for shard in shards[rank::world_size] if shard in wanted]
        _encode(mine, column, device, workers, show=rank == 0)
        if world_size > 1:  # a rank may be done hours before another
            dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(days=1)))
        if left := column.files.missing(shards):
            raise ValueError(
                f"{column.files.folder} has no features of {left[0]} although all were encoded: the "
                "shards changed meanwhile, or the ranks do not share the folder"
            )


def check_local(files: FeatureFiles, shards: Sequence[str]) -> None:
    """Raise ValueError if ``shards`` are not local files, or two have one name, size and time."""
    names: dict[str, str] = {}
    for shard in shards:
        try:
            name = files.path(shard).name
        except OSError as error:
            raise ValueError(
                f"features are kept of local shards, not of {shard}: {error}"
            ) from error
        if (other := names.setdefault(name, shard)) != shard:
            raise ValueError(
                f"{shard} and {other} have one name, size and time, by which features are found; "
                "touch one of them"
            )


def _encode(
    shards: Sequence[str], column: Column, device: torch.device, workers: int, *, show: bool
) -> None:
    if not shards:
        return
    batches = _Batches(shards, column.inputs, 64 if device.type == "cpu" else 256)
    # A generator of its own: the loader must not draw from the training's random numbers.
    settings = {"num_workers": min(workers, len(shards)), "generator": torch.Generator()}
    loader = DataLoader(batches, batch_size=None, **settings)
    parts: dict[str, list[np.ndarray]] = {shard: [] for shard in shards}
    said = "whole numbers"
    with tqdm(desc=f"Encoding ({column.kind})", unit="sample", disable=not show) as bar:
        for shard, batch in loader:
            if batch is None:
                rows = np.concatenate(parts.pop(shard) or [np.zeros((0, 1, 1))])
                if column.encode is not None:
                    rows, said = in_half(rows)
                column.files.write(shard, rows)
            else:
                parts[shard].append(column.rows(*batch))
                bar.update(len(batch[0]))
    logging.info(f"Features ({column.kind}) are kept in {said}")
