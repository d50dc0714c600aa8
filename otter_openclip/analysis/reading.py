"""Some pairs of ``--train-data``, from all of its shards, as open_clip's loader takes them.

What that passes over is counted with its reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image
from webdataset.gopen import gopen

from otter_openclip.shards.names import shard_names
from otter_openclip.shards.read import (
    TRAINING_IMAGES,
    SampleError,
    caption,
    image_file,
    opened,
    rgb,
    samples,
)
from otter_openclip.shards.sizes import listed_samples


class Pair(NamedTuple):
    """A picture and its caption."""

    shard: str  # path or address
    index: int  # its place among the shard's samples
    key: str  # its name in the shard
    caption: str
    image: Image.Image  # RGB
    digest: bytes  # of the picture's file


class Reader:
    """Reads up to ``count`` pairs, the same ones each time."""

    def __init__(self, shards: str, count: int) -> None:
        """``shards`` as of ``--train-data``; ValueError if that is a table."""
        self.shards, self.count = shards, count
        self.urls = shard_names("--train-data", shards)
        self.passed_over: Counter[str] = Counter()  # samples, by reason
        self.pairs_in_all: int | None = None  # of the data, if that is known

    def __iter__(self) -> Iterator[Pair]:
        """As many pairs of each shard as it takes; ValueError in the end if they are fewer than two."""
        # Short shards come first, so that longer ones make up for them.
        self.urls.sort(key=lambda url: os.path.getsize(url) if os.path.exists(url) else 0)
        with contextlib.suppress(OSError, ValueError):
            self.pairs_in_all = listed_samples(self.urls)
        missing, complete = self.count, True
        for number, url in enumerate(self.urls):
            if not missing:
                complete = False
                break
            share = -(-missing // (len(self.urls) - number))
            for pair in self._pairs(url):
                if not share:
                    complete = False
                    break
                yield pair
                share, missing = share - 1, missing - 1
        taken = self.count - missing
        if complete:
            self.pairs_in_all = taken
        if taken < 2:
            listed = (f"{times} with: {why}" for why, times in self.passed_over.most_common(5))
            raise ValueError(
                f"--train-data {self.shards} gave {taken} usable pairs, at least 2 are needed; "
                f"passed over: {'; '.join(listed) or 'none'}"
            )

    def _pairs(self, url: str) -> Iterator[Pair]:
        """The pairs of a shard, up to where it can be read."""
        try:
            file = gopen(url)
            try:
                for index, (key, files) in enumerate(samples(url, file=file)):
                    try:
                        content = image_file(files, TRAINING_IMAGES)
                        image = rgb(opened(content))
                        # Training takes an empty caption as it is.
                        text = caption(files) if files.get("txt", b"none").strip() else ""
                    except SampleError as error:
                        self.passed_over[str(error)] += 1
                        continue
                    digest = hashlib.blake2b(content, digest_size=16).digest()
                    yield Pair(url, index, key, text, image, digest)
            finally:
                with contextlib.suppress(Exception):  # Of a pipe that is not read to its end.
                    file.close()
        except Exception as error:  # gopen, curl and tarfile each have their own.
            self.passed_over[f"{url}: {getattr(error, 'strerror', None) or error}"] += 1
