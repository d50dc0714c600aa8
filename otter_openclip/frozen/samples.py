"""The training samples as open_clip's own loaders read them: what each holds, and its image.

Both kinds are read by parts, a shard or some rows of the table, which processes share out.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from open_clip_train.data import (
    CsvDataset,
    expand_urls,
    filter_no_caption_or_no_image,
    log_and_continue,
    tarfile_to_samples_nothrow,
)
from PIL import Image
from torch import Tensor
from webdataset import decode

from otter_openclip.frozen.store import DIGEST, digest

Tokenizer = Callable[[list[str]], Tensor]

_IMAGES = ("jpg", "png", "jpeg", "webp")  # open_clip's order of preference
_ROWS = 1000


class Scan(NamedTuple):
    """What a part holds, one entry a sample, in the order of the data."""

    usable: np.ndarray  # (N,) bool: it has a caption, and an image, which may be unreadable
    images: np.ndarray  # (N,) digests of the images' files; empty strings if not asked for
    tokens: np.ndarray  # (N, context) int32


class SampleError(ValueError):
    """A sample with which open_clip's own loader would end the run."""


class ShardSamples:
    """Samples of webdataset shards."""

    def __init__(self, urls: str, weights: str | None, tokenizer: Tokenizer) -> None:
        """``urls`` and ``weights`` as of ``--train-data`` and its upsampling factors."""
        self.parts = list(dict.fromkeys(expand_urls(urls, weights)[0]))
        self._tokenizer = tokenizer

    def scan(self, part: str, images: bool) -> Scan:
        """What the shard holds; digests of the images only if asked for."""
        usable, keys, captions = [], [], []
        for sample in _read(part):
            caption = _decoded(sample, without=_IMAGES).get("txt")
            found = filter_no_caption_or_no_image(sample) and caption is not None
            usable.append(found)
            captions.append(caption if found else "")
            keys.append(digest(_image(sample)) if found and images else b"")
        tokens = self._tokenizer(captions).numpy() if captions else np.zeros((0, 0))
        return Scan(np.array(usable, bool), np.array(keys, DIGEST), tokens.astype(np.int32))

    def images(
        self, part: str, wanted: Callable[[bytes], bool]
    ) -> Iterator[tuple[bytes, Image.Image | None]]:
        """Digest and RGB image of those that are ``wanted``, None for an unreadable one."""
        for sample in _read(part):
            if filter_no_caption_or_no_image(sample) and wanted(key := digest(_image(sample))):
                name = next(name for name in _IMAGES if name in sample)
                fields = {"__key__": sample["__key__"], name: sample[name]}
                yield key, _decoded(fields).get(name)


def _read(url: str) -> Iterator[dict[str, Any]]:
    return tarfile_to_samples_nothrow(iter([{"url": url}]))


def _image(sample: dict[str, Any]) -> bytes:
    return next(sample[name] for name in _IMAGES if name in sample)


def _decoded(sample: dict[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """As open_clip's loader decodes it; {} if it drops the sample."""
    fields = {name: value for name, value in sample.items() if name not in without}
    return next(iter(decode("pilrgb", handler=log_and_continue)(iter([fields]))), {})


def _mode(content: bytes) -> str:
    """PIL's mode of an image; that of one which cannot be read is not asked for again."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.mode
    except Exception:  # PIL's plugins raise nearly everything
        return "RGB"


class TableSamples:
    """Samples of a csv file's rows; images are files."""

    def __init__(self, table: CsvDataset, tokenizer: Tokenizer) -> None:
        self._images, self._captions = table.images, table.captions
        self._tokenizer = tokenizer
        self.parts = list(range(0, len(table), _ROWS))

    def _rows(self, part: int) -> range:
        return range(part, min(part + _ROWS, len(self._images)))

    def _error(self, row: int, error: Exception) -> SampleError:
        return SampleError(
            f"row {row + 1} of the table: cannot read {self._images[row]}: {error}; remove the row or "
            "put the image there"
        )

    def _key(self, row: int) -> bytes:
        """The digest of the image's file; shards' own only where both loaders see the same image.

        open_clip resizes a table's image in its own mode (a palette by nearest neighbours, for one),
        a shard's in RGB.
        """
        try:
            with open(str(self._images[row]), "rb") as file:
                content = file.read()
        except OSError as error:
            raise self._error(row, error) from error
        mode = _mode(content)
        return digest(content) if mode == "RGB" else digest(content, mode.encode())

    def scan(self, part: int, images: bool) -> Scan:
        """What the rows from ``part`` on hold; digests of the images only if asked for.

        Raises:
            SampleError: if an image file cannot be read.
        """
        rows = self._rows(part)
        keys = [self._key(row) if images else b"" for row in rows]
        tokens = self._tokenizer([str(self._captions[row]) for row in rows]).numpy()
        return Scan(np.ones(len(rows), bool), np.array(keys, DIGEST), tokens.astype(np.int32))

    def images(
        self, part: int, wanted: Callable[[bytes], bool]
    ) -> Iterator[tuple[bytes, Image.Image]]:
        """Digest and image of those that are ``wanted``.

        Raises:
            SampleError: if one cannot be read; open_clip would end the run with it, too.
        """
        for row in self._rows(part):
            if wanted(key := self._key(row)):
                try:
                    image = Image.open(str(self._images[row]))
                    image.load()
                except Exception as error:  # PIL's plugins raise nearly everything
                    raise self._error(row, error) from error
                yield key, image
