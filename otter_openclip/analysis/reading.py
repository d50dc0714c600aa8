"""Some pairs of ``--train-data``, from all over it, read as open_clip's loaders read them.

What those pass over, and what they would stop at, is counted with its reason.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
from open_clip_train.data import expand_urls, get_dataset_size
from PIL import Image
from webdataset.gopen import gopen

from otter_openclip.frozen.store import digest
from otter_openclip.shards import read as shard_samples
from otter_openclip.shards.faults import SampleError
from otter_openclip.training.watch import TABLES, fault

THUMBNAIL = 160  # pixels along the longer side
_ROWS = 10_000  # of a table at once
_NAMED = 5


class Pair(NamedTuple):
    """A picture and its caption."""

    place: str
    caption: str
    image: Image.Image  # RGB
    key: bytes  # digest of the picture's file


class Reader:
    """Reads up to ``samples`` pairs, the same ones each time.

    Attributes:
        passed_over: reason -> number of samples.
        places: reason -> the first sample it was met at.
        pairs_in_all: of the data; None if that is not known.
    """

    def __init__(self, args: Namespace) -> None:
        """``args`` has ``train_data``, the ``csv_...`` flags, ``dataset_type`` and ``samples``.

        Raises:
            ValueError: if there are no such data.
        """
        if reason := fault(Namespace(**vars(args), workers=0, dataset_resampled=False)):
            raise ValueError(reason)
        self.args = args
        self.passed_over: Counter[str] = Counter()
        self.places: dict[str, str] = {}
        self.pairs_in_all: int | None = None

    def __iter__(self) -> Iterator[Pair]:
        """The pairs that can be used; all attributes are known in the end.

        Raises:
            ValueError: in the end, if they are fewer than two.
        """
        kind, path = self.args.dataset_type, self.args.train_data
        table, count = kind == "csv" or (kind == "auto" and path.endswith(TABLES)), 0
        for pair in self._of_table() if table else self._of_shards():
            count += 1
            yield pair
        if count < 2:
            most = self.passed_over.most_common(_NAMED)
            reasons = "; ".join(f"{number} with: {reason}" for reason, number in most)
            raise ValueError(
                f"--train-data {path} gave {count} usable pairs, at least 2 are needed"
                + f"; passed over: {reasons}" * bool(reasons)
            )

    def _pass_over(self, place: str, reason: str) -> None:
        self.passed_over[reason] += 1
        self.places.setdefault(reason, place)

    def _of_shards(self) -> Iterator[Pair]:
        """As many from each shard as it takes; short ones first, so that others make up for them."""
        urls = list(dict.fromkeys(expand_urls(self.args.train_data)[0]))
        urls.sort(key=lambda url: os.path.getsize(url) if os.path.exists(url) else 0)
        with contextlib.suppress(OSError, KeyError, ValueError):
            self.pairs_in_all = get_dataset_size(self.args.train_data)[0]
        left, complete, met = self.args.samples, True, 0
        for number, url in enumerate(urls):
            share = -(-left // (len(urls) - number))
            for place, files in self._shard(url):
                if not share:
                    complete = False
                    break
                met += 1
                try:
                    caption = shard_samples.caption(files)
                    content = shard_samples.image_file(files, shard_samples.TRAINING_IMAGES)
                    yield self._pair(place, caption, content)
                    share, left = share - 1, left - 1
                except SampleError as error:
                    self._pass_over(place, str(error))
        if complete:
            self.pairs_in_all = met

    def _shard(self, url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(shard and key, files) of each sample, up to where the shard can be read."""
        try:
            file = gopen(url)
            try:
                for key, files in shard_samples.samples(url, file=file):
                    yield f"{url}: {key}", files
            finally:
                with contextlib.suppress(Exception):  # of a pipe that is not read to its end
                    file.close()
        except Exception as error:  # gopen, curl and tarfile each have their own
            self._pass_over(url, f"shard: {getattr(error, 'strerror', None) or error}")

    def _of_table(self) -> Iterator[Pair]:
        """Rows drawn by lot in one pass over the table, and of these the pictures."""
        args, rng = self.args, random.Random(0)
        chosen: list[tuple[int, Any, Any]] = []
        total = 0
        columns = [args.csv_img_key, args.csv_caption_key]
        with pd.read_csv(
            args.train_data, sep=args.csv_separator, usecols=columns, chunksize=_ROWS
        ) as table:
            for chunk in table:
                for row in zip(*(chunk[name].tolist() for name in columns), strict=True):
                    total += 1
                    place = total - 1 if total <= args.samples else rng.randrange(total)
                    if place < args.samples:
                        chosen[place : place + 1] = [(total, *row)]
        self.pairs_in_all = total
        for row, path, caption in sorted(chosen, key=lambda found: found[0]):
            try:
                if pd.isna(caption) or not str(caption).strip():
                    raise SampleError("empty caption")
                try:
                    with open(str(path), "rb") as file:
                        content = file.read()
                except OSError as error:
                    raise SampleError(f"image file: {error.strerror}") from error
                yield self._pair(f"row {row}: {path}", str(caption), content)
            except SampleError as error:
                self._pass_over(f"row {row}: {path}", str(error))

    def _pair(self, place: str, caption: str, content: bytes) -> Pair:
        image = shard_samples.rgb(shard_samples.opened(content))
        return Pair(place, caption, image, digest(content))


def thumbnail(image: Image.Image) -> bytes:
    """A small JPEG of an RGB image."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer := io.BytesIO(), "JPEG", quality=78)
    return buffer.getvalue()
