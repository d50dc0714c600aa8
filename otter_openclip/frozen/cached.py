"""``--feature-cache DIR``: what a frozen prefix gives is computed once a sample; training reads that.

At the start the training data are read once, to know what is in them now; what DIR lacks is encoded.
Then features take the place of images and tokens in open_clip's own loader, sample for sample in the
order in which those would have come.
"""

from __future__ import annotations

import contextlib
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import webdataset as wds
from open_clip_train.data import CsvDataset, DataInfo, tarfile_to_samples_nothrow
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from otter_openclip.frozen.encoding import ImageInputs, TokenInputs
from otter_openclip.frozen.filling import Tower
from otter_openclip.frozen.samples import SampleError, Scan, ShardSamples, TableSamples
from otter_openclip.frozen.store import DIGEST, FeatureStore, digest

Samples = ShardSamples | TableSamples


def use_features(
    args: Namespace,
    train: DataInfo,
    model: nn.Module,
    prefixes: dict[str, str],
    transform: Callable[..., Tensor],
) -> None:
    """Let open_clip's training loader give features; ``--feature-cache`` gets those that it lacks.

    Args:
        args: open_clip_train's, with ``feature_cache``, ``feature_views`` and ``feature_precision``.
        train: changed in place.
        model: the bare model, before training.
        prefixes: ``find_prefixes`` of it.
        transform: of images; random if there are several views.

    Raises:
        SystemExit: with the reason, if the data, the folder or the features cannot be used.
    """
    with _reasons_given(args.feature_cache):
        tokenizer = open_clip.get_tokenizer(
            args.model, cache_dir=args.cache_dir, context_length=args.force_context_length
        )
        table = train.dataloader.dataset if train.shared_epoch is None else None
        samples = (
            ShardSamples(args.train_data, args.train_data_upsampling_factors, tokenizer)
            if table is None
            else TableSamples(table, tokenizer)
        )
        scans = _scan(args, samples, "visual" in prefixes)
        usable = np.concatenate([scan.usable for scan in scans])
        if lacking := int((~usable).sum()):
            logging.warning(f"{lacking} samples have no image or no readable caption; left out")
        if not usable.any():
            raise ValueError(f"no sample of {args.train_data} has both an image and a caption")
        tokens = np.concatenate([scan.tokens for scan in scans if len(scan.tokens)])
        keys = {"text": _token_digests(tokens)}
        keys["visual"] = np.concatenate([scan.images for scan in scans])
        stores: dict[str, FeatureStore] = {}
        rows: dict[str, np.ndarray] = {}
        for tower, prefix in prefixes.items():
            wanted = np.unique(keys[tower][usable])
            if tower == "visual":
                inputs = ImageInputs(samples, transform, args.feature_views)
                further = {"transform": transform, "views": args.feature_views}
            else:
                inputs, further = TokenInputs(keys[tower], tokens), {}
            stores[tower] = Tower(args, model, tower, prefix, further).filled(wanted, inputs)
            rows[tower] = stores[tower].find(keys[tower])
        dtype = open_clip.get_input_dtype(args.precision) or torch.float32
        if "visual" not in prefixes:
            _replace_tokenizer(train, table, _TextFeatures(tokenizer, stores["text"], dtype))
            return
        readable = stores["visual"].readable(rows["visual"][usable])
        if not readable.all():
            logging.warning(f"{(~readable).sum()} samples have an unreadable image; left out")
            usable[usable] = readable
        if not usable.any():  # drawing with replacement would look for one for ever
            raise ValueError(f"no sample of {args.train_data} has a readable image")
        needed = args.batch_size * args.world_size
        if needed > usable.sum() and not args.dataset_resampled:
            raise ValueError(
                f"{usable.sum()} usable samples do not fill a batch of {args.batch_size} on each of "
                f"{args.world_size} ranks; lower --batch-size"
            )
        gather = _Gather(stores, rows, tokens, args.feature_views, dtype)
        if table is not None:
            table.gather, table.__class__ = gather, _FeatureTable
            return
        ends = np.cumsum([len(scan.usable) for scan in scans]).tolist()
        spans = {
            part: range(end - len(scan.usable), end)
            for part, scan, end in zip(samples.parts, scans, ends, strict=True)
        }
        _replace_stages(train, spans, usable, gather, args.batch_size)


@contextlib.contextmanager
def _reasons_given(folder: str) -> Iterator[None]:
    """Errors of the data and of the disk end the command with one line."""
    try:
        yield
    except ValueError as error:
        # A loader's process puts its traceback around the message.
        reason = str(error).rpartition(f"{SampleError.__name__}: ")[2].strip()
        raise SystemExit(f"--feature-cache: {reason}") from error
    except OSError as error:
        raise SystemExit(
            f"--feature-cache {folder}: {error}; what is encoded stays there, the same command goes on "
            "with the rest"
        ) from error


def _token_digests(tokens: np.ndarray) -> np.ndarray:
    """Digests (N,) of tokens (N, context)."""
    return np.array([digest(row.tobytes()) for row in np.ascontiguousarray(tokens, "<i4")], DIGEST)


class _Scanner:
    """Collates a part into what it holds: in the loader's processes."""

    def __init__(self, samples: Samples, images: bool) -> None:
        self.samples, self.images = samples, images

    def __call__(self, part: Any) -> Scan:
        return self.samples.scan(part, self.images)


def _scan(args: Namespace, samples: Samples, images: bool) -> list[Scan]:
    """What the data hold now, part by part; the ranks share the reading."""
    mine = samples.parts[args.rank :: args.world_size]
    workers = min(args.workers, len(mine))
    scanner = _Scanner(samples, images)
    reader = DataLoader(mine, batch_size=None, collate_fn=scanner, num_workers=workers)
    bar = tqdm(reader, "Reading the data", len(mine), unit="part", disable=args.rank != 0)
    if args.world_size == 1:
        return list(bar)
    every: list[Any] = [None] * args.world_size
    dist.all_gather_object(every, list(bar))
    return [every[i % args.world_size][i // args.world_size] for i in range(len(samples.parts))]


class _Gather:
    """Batches (image features, text features or tokens) of samples given by their numbers."""

    def __init__(
        self,
        stores: dict[str, FeatureStore],
        rows: dict[str, np.ndarray],
        tokens: np.ndarray,
        views: int,
        dtype: torch.dtype,
    ) -> None:
        self.stores, self.rows, self.views, self.dtype = stores, rows, views, dtype
        self.tokens = None if "text" in stores else tokens

    def __call__(self, numbers: list[int]) -> list[Tensor]:
        views = torch.randint(self.views, (len(numbers),)).numpy() if self.views > 1 else 0
        images = self.stores["visual"].take(self.rows["visual"][numbers], views)
        if self.tokens is None:
            texts = self.stores["text"].take(self.rows["text"][numbers]).to(self.dtype)
        else:
            texts = torch.from_numpy(self.tokens[numbers]).long()
        return [images.to(self.dtype), texts]


class _FeatureTable(CsvDataset):
    """The rows of a csv file, each with its features."""

    gather: _Gather

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        images, texts = self.gather([row])
        return images[0], texts[0]

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*self.gather(rows), strict=True))


class _ReadNumbers:
    """Pipeline stage in place of reading tars: the numbers of a shard's samples."""

    def __init__(self, spans: dict[str, range]) -> None:
        self.spans = spans

    def __call__(self, shards: Iterator[dict[str, Any]]) -> Iterator[int]:
        for shard in shards:
            yield from self.spans[shard["url"]]


class _LeaveOut:
    """Pipeline stage in place of what drops samples."""

    def __init__(self, usable: np.ndarray, batch_size: int) -> None:
        self.usable, self.batch_size = usable, batch_size

    def __call__(self, numbers: Iterator[int]) -> Iterator[int]:
        count = 0
        for number in numbers:
            if self.usable[number]:
                count += 1
                yield number
        if count < self.batch_size:  # it would look for a batch for ever
            raise ValueError(
                f"a worker's shards hold {count} usable samples, less than a batch of "
                f"{self.batch_size}; lower --workers or --batch-size"
            )


def _replace_stages(
    train: DataInfo,
    spans: dict[str, range],
    usable: np.ndarray,
    gather: _Gather,
    batch_size: int,
) -> None:
    """In open_clip's webdataset pipeline: the order of shards and samples stays, their content goes."""
    stages = train.dataloader.pipeline[0].dataset.pipeline
    start = stages.index(tarfile_to_samples_nothrow)
    shuffle = stages[start + 1]
    batched = wds.batched(batch_size, collation_fn=gather, partial=False)
    stages[start:] = [_ReadNumbers(spans), shuffle, _LeaveOut(usable, batch_size), batched]


class _TextFeatures:
    """In place of the tokenizer: the features (N, width) of texts."""

    def __init__(
        self, tokenizer: Callable[[Any], Tensor], store: FeatureStore, dtype: torch.dtype
    ) -> None:
        self.tokenizer, self.store, self.dtype = tokenizer, store, dtype

    def __call__(self, texts: str | list[str]) -> Tensor:
        rows = self.store.find(_token_digests(self.tokenizer(texts).numpy()))
        if (rows < 0).any():
            raise RuntimeError(
                f"the caption {texts!r} was not there when training began; start it again"
            )
        return self.store.take(rows).to(self.dtype)

    def one(self, text: str) -> Tensor:
        """Features (width,) of a text."""
        return self(text)[0]


def _replace_tokenizer(train: DataInfo, table: CsvDataset | None, features: _TextFeatures) -> None:
    if table is not None:
        table.tokenize = features
        return
    for stage in train.dataloader.pipeline[0].dataset.pipeline:
        if "text" in getattr(stage, "kw", {}) and callable(stage.kw["text"]):
            stage.kw["text"] = features.one
