"""``--dataset-type csv``: what would end an epoch in its midst, or be trained on in its place."""

from __future__ import annotations

import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from open_clip_train.data import CsvDataset, DataInfo
from PIL import Image

from otter_openclip.shards import read
from otter_openclip.training.watch import NoBatchError

_AT_ONCE = 4096  # rows


def check_tables(args: Namespace, data: dict[str, DataInfo]) -> None:
    """Look at every row of the tables of ``data``, a share of them on each rank.

    Raises:
        ValueError: naming the first row that has no caption or no picture that can be used.
    """
    for flag in ("train", "val"):
        table = getattr(getattr(data.get(flag), "dataloader", None), "dataset", None)
        if not isinstance(table, CsvDataset):
            continue
        logging.info(f"Looking at {len(table)} rows of --{flag}-data")
        for row, fault in _faults(table, args):
            raise ValueError(
                f"--{flag}-data {getattr(args, f'{flag}_data')}: row {row} below the header: {fault}; "
                "mend it, or build shards with otter-openclip data csv, which leaves such rows out"
            )
        table.transforms = _Named(table.transforms)


class _Named:
    """open_clip's transform, which names a picture that is damaged inside: only decoding tells."""

    def __init__(self, transform: Callable[[Image.Image], Any]) -> None:
        self._transform = transform

    def __call__(self, image: Image.Image) -> Any:
        try:
            return self._transform(image)
        except OSError as error:
            then = "mend it or drop its row, then --resume latest goes on from the last checkpoint"
            raise NoBatchError(f"{image.filename}: unreadable image: {error}; {then}") from error


def _faults(table: CsvDataset, args: Namespace) -> Iterator[tuple[int, str]]:
    for row, (path, caption) in enumerate(zip(table.images, table.captions, strict=True), 1):
        if caption != caption:
            yield row, "no caption, or one that pandas takes for none (NA, null)"
        elif isinstance(caption, str) and "\n" in caption and args.csv_separator in caption:
            # A caption of several lines may have commas, but not the name of a picture.
            suffix = os.path.splitext(str(path))[1]
            if args.csv_separator == "\t" or (suffix and suffix in caption):
                yield row, "a quotation mark joins several rows into one; double it"
    # The readers' own filters of warnings are not made for threads: this one puts them right again.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        for begin in range(args.rank, len(table.images), _AT_ONCE * args.world_size):
            places = range(begin, len(table.images), args.world_size)[:_AT_ONCE]
            paths = [str(table.images[place]) for place in places]
            for place, fault in zip(places, pool.map(_picture_fault, paths), strict=True):
                if fault is not None:
                    yield place + 1, fault


def _picture_fault(path: str) -> str | None:
    """Why the file is no picture for training, None if it is one."""
    try:
        with open(path, "rb") as file:
            read.check_image(file)
    except FileNotFoundError:
        return f"{path}: no such file; a path counts from the current folder"
    except (OSError, ValueError) as error:
        return f"{path}: {getattr(error, 'strerror', None) or error}"
    return None
