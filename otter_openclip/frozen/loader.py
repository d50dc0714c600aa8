"""``--feature-cache``: open_clip's training loader gives kept features in place of images and tokens.

Shards, their order and that of their samples are open_clip's; a sample is a row of a file.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset as wds
from open_clip_train.data import DataInfo, expand_urls, tarfile_to_samples_nothrow
from torch import Tensor, nn

from otter_openclip.frozen.encode import (
    Column,
    ImageInputs,
    TokenInputs,
    TowerEncoder,
    check_local,
    fill,
    fingerprint,
    tokenizer_settings,
    tower_fingerprint,
)
from otter_openclip.frozen.store import FeatureFiles
from otter_openclip.preprocessing import size_pair

_WEIGHT_UNITS = 1_000_000  # of a pair's weight among tokens, which are whole numbers


def image_column(
    model: nn.Module,
    name: str,
    folder: Path,
    transform: Callable[[Any], Tensor],
    *,
    device: torch.device,
    precision: str = "fp32",
    reference_crop: bool = False,
) -> Column:
    """What the prefix ``name`` of the image tower gives for images under ``transform``.

    ``transform`` is that of the model's preprocessing, or of ``reference_crop``; precision as of
    open_clip's ``--precision``.
    """
    config = model.visual.preprocess_cfg
    settings = {
        "preprocessing": config | {"size": size_pair(config["size"])},
        "reference_crop": reference_crop,
        "precision": precision,
    }
    key = tower_fingerprint(model, "visual", name, settings)
    encoder = TowerEncoder(model, "visual", name, device, precision)
    return Column("image", folder, key, ImageInputs(transform), encoder)


def text_column(
    model: nn.Module,
    name: str | None,
    folder: Path,
    tokenizer: Callable[..., Tensor],
    *,
    device: torch.device,
    precision: str = "fp32",
) -> Column:
    """What the prefix ``name`` of the text tower gives for captions; their tokens if it is None."""
    settings = tokenizer_settings(tokenizer)
    if name is None:
        return Column("tokens", folder, fingerprint(settings), TokenInputs(tokenizer))
    key = tower_fingerprint(model, "text", name, settings | {"precision": precision})
    encoder = TowerEncoder(model, "text", name, device, precision)
    return Column("text", folder, key, TokenInputs(tokenizer), encoder)


def student_tokenizer(args: Namespace) -> Any:
    """The tokenizer of a run's model, as open_clip's ``main`` makes it."""
    context = {"cache_dir": args.cache_dir, "context_length": args.force_context_length}
    return open_clip.get_tokenizer(args.model, **context)


def use_features(
    args: Namespace,
    train: DataInfo,
    model: nn.Module,
    prefixes: Mapping[str, str],
    transform: Callable[..., Tensor],
) -> None:
    """Let open_clip's webdataset loader ``train`` give features; those that are not kept yet are made.

    ``model`` is the bare model with its ``prefixes``, ``transform`` that of images.

    Raises:
        ValueError: if the shards or the features cannot be used.
        OSError: if the folder cannot be written.
    """
    folder, device = Path(args.feature_cache), torch.device(args.device)
    tokenizer = student_tokenizer(args)
    common = {"device": device, "precision": args.precision}
    columns = [text_column(model, prefixes.get("text"), folder, tokenizer, **common)]
    if "visual" in prefixes:
        common["reference_crop"] = args.reference_crop
        columns.insert(0, image_column(model, prefixes["visual"], folder, transform, **common))
    urls, _ = expand_urls(args.train_data, args.train_data_upsampling_factors)
    ranks = {"rank": args.rank, "world_size": args.world_size, "workers": args.workers}
    fill(columns, list(dict.fromkeys(urls)), device=device, **ranks)
    dtype = open_clip.get_input_dtype(args.precision) or torch.float32
    stages = train.dataloader.pipeline[0].dataset.pipeline
    if "visual" not in prefixes:  # images are read as ever, and captions become their features
        mapping = next(stage for stage in stages if callable(getattr(stage, "kw", {}).get("text")))
        mapping.kw["text"] = str  # no tokens are needed
        _read_beside(stages, columns[0].files, dtype)
        return
    start = stages.index(tarfile_to_samples_nothrow)
    shuffle = stages[start + 1]
    batched = wds.batched(args.batch_size, collation_fn=_Collate(dtype), partial=False)
    rows = _ReadRows([column.files for column in columns])
    stages[start:] = [rows, shuffle, _drop_unusable, batched]


def add_weights(args: Namespace, train: DataInfo, weights: FeatureFiles) -> None:
    """Let the webdataset loader ``train`` give a further column of texts: the pair's weight.

    Only texts reach the model as the loader gives them, whatever the accumulation; ``split_weights``
    takes the column off there. Call it after ``use_features``. ValueError if a shard has no weights.
    """
    urls, _ = expand_urls(args.train_data, args.train_data_upsampling_factors)
    check_local(weights, urls)
    if missing := weights.missing(list(dict.fromkeys(urls))):
        raise ValueError(
            f"{weights.folder} has no weights of {missing[0]}: they are of other shards, or it was "
            "changed since; fit again"
        )
    stages = train.dataloader.pipeline[0].dataset.pipeline
    reading = next((s for s in stages if isinstance(s, _ReadRows | _ReadSamples)), None)
    if reading is None:
        _read_beside(stages, weights, None)
    else:
        reading.files.append(weights)


def _read_beside(stages: list[Any], files: FeatureFiles, dtype: torch.dtype | None) -> None:
    """Let samples be read with their rows of ``files``, which become, or come behind, their texts."""
    stages[stages.index(tarfile_to_samples_nothrow)] = _ReadSamples([files])
    tuples = next(s for s in stages if getattr(s, "f", None) is wds.filters.to_tuple.f)
    stages.insert(stages.index(tuples), _PutRows(dtype))


def _joined(texts: Tensor, weights: Tensor) -> Tensor:
    """Features or tokens (..., width) with the weights (..., 1) behind them."""
    if not texts.is_floating_point():
        weights = (weights * _WEIGHT_UNITS).round()
    return torch.cat([texts, weights.to(texts.dtype)], dim=-1)


def split_weights(texts: Tensor) -> tuple[Tensor, Tensor]:
    """Texts (B, width) and weights (B,) of what the loader gives after ``add_weights``."""
    texts, weights = texts[:, :-1], texts[:, -1].float()
    return texts, weights if texts.is_floating_point() else weights / _WEIGHT_UNITS


class _ReadRows:
    """In place of reading tars: a row of each file for each sample, None for an unusable one."""

    def __init__(self, files: list[FeatureFiles]) -> None:
        self.files = files

    def __call__(self, shards: Iterator[dict[str, Any]]) -> Iterator[tuple[np.ndarray, ...] | None]:
        for shard in shards:
            for rows in zip(*(files.rows(shard["url"]) for files in self.files), strict=True):
                yield None if any(row is None for row in rows) else rows


def _drop_unusable(samples: Iterator[Any]) -> Iterator[Any]:
    """After the shuffle, whose order is then that of live training, which drops them there, too."""
    return (sample for sample in samples if sample is not None)


class _Collate:
    """Batches of features in the run's dtype, and of tokens."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, samples: list[tuple[np.ndarray, ...]]) -> list[Tensor]:
        columns = [torch.from_numpy(np.stack(rows)) for rows in zip(*samples, strict=True)]
        images, texts = columns[0].to(self.dtype), columns[1]
        texts = texts.to(self.dtype) if texts.is_floating_point() else texts.long()
        return [images, _joined(texts, columns[2]) if len(columns) > 2 else texts]


class _ReadSamples:
    """In place of open_clip's reading of tars, by which it reads: each sample with its row of each file.

    Where a tar is damaged the rows may be more than the samples.
    """

    def __init__(self, files: list[FeatureFiles]) -> None:
        self.files = files

    def __call__(self, shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            samples = tarfile_to_samples_nothrow(iter([shard]))
            rows = zip(*(files.rows(shard["url"]) for files in self.files), strict=True)
            for sample, values in zip(samples, rows, strict=False):
                yield sample | {"__rows__": values}


class _PutRows:
    """Makes a sample's text of its rows; one that has no row is left out."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        """``dtype`` is that of text features, the first of the rows; None if texts are tokens."""
        self.dtype = dtype

    def __call__(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            if any(row is None for row in sample["__rows__"]):
                continue
            text, *rows = map(torch.from_numpy, sample["__rows__"])
            if self.dtype is None:
                text, rows = sample["text"], [text]
            else:
                text = text.to(self.dtype)
            yield sample | {"text": _joined(text, *rows) if rows else text}
