"""Images and labels of a multi-label clip_benchmark webdataset, as features in a fixed order.

The order is that of the shards and of the samples in them, whatever the number of loader workers and
of ranks: what a metric depends on does not change with them. To read on through an incomplete image,
``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` is replaced while it is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ImageFile
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from otter_openclip.evaluation.classifier import Autocast
from otter_openclip.evaluation.prompts import CLASSES_FILE
from otter_openclip.replacing import replaced
from otter_openclip.shards import read as shard_samples
from otter_openclip.shards.faults import Fault, SampleError

Batch = tuple[Tensor, list[np.ndarray], list[tuple[int, int]]]  # images, labels, (shard, sample)


class ImageError(ValueError):
    """A sample or shard that cannot be used; the message names it."""


def is_multilabel(dataset: Any) -> bool:
    """Whether clip_benchmark opened ``dataset`` as a multi-label webdataset."""
    stages = getattr(dataset, "pipeline", [])
    return any("npy" in getattr(stage, "args", ()) for stage in stages)


class MultiLabelImages(IterableDataset):
    """Batches of images, labels and places of a labelled webdataset, or the error that ends them.

    Each loader worker of each rank is a slot. With at least as many shards as slots a slot reads every
    slots-th shard; with fewer, the slots share the shards and each decodes its part of the samples.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable,
        classes: int,
        *,
        load_truncated: bool = False,
        names_file: str | None = None,
    ) -> None:
        """Take shards and tar reading, with its cache, from clip_benchmark's ``dataset``.

        ``transform`` is of PIL images to tensors, ``classes`` the length of the class list; with
        ``load_truncated`` what is missing of an incomplete image is grey instead of an error.
        ``names_file`` is where the class names are from, if not the dataset's own.
        """
        super().__init__()
        self.urls = list(dataset.pipeline[0].urls)
        functions = {getattr(getattr(s, "f", s), "__name__", ""): s for s in dataset.pipeline}
        self.read = next(stage for name, stage in functions.items() if "tarfile" in name)
        self.label_file = "npy" if is_multilabel(dataset) else "cls"
        self.names_file = names_file or CLASSES_FILE
        self.transform, self.classes, self.load_truncated = transform, classes, load_truncated
        self.batch_size, self.rank, self.world_size = 64, 0, 1

    def check(self) -> None:
        """Raise ImageError now, before anything expensive, if the first sample cannot be used.

        The folder with all its samples is checked before, by ``folders.check_webdataset``; this also
        knows of addresses and of class names from elsewhere.
        """
        for url in self.urls:
            for _, sample in self._samples(url, 0, 1):
                self._labels(sample, url)
                return
        raise ImageError(f"no images in {len(self.urls)} shards, first {self.urls[0]}")

    def __iter__(self) -> Iterator[Batch | ImageError]:
        """Batches; an error is yielded, because a worker's exception would lose its text."""
        batch: list[Any] = []
        try:
            for shard, offset, step in self._shares():
                url = self.urls[shard]
                for place, sample in self._samples(url, offset, step):
                    image, labels = self._image(sample, url), self._labels(sample, url)
                    batch.append((image, labels, (shard, place)))
                    if len(batch) == self.batch_size:
                        yield _collate(batch)
                        batch = []
            if batch:
                yield _collate(batch)
        except ImageError as error:
            yield error

    def _shares(self) -> list[tuple[int, int, int]]:
        """This slot's (shard, first sample, step)."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        slot, slots = worker * self.world_size + self.rank, workers * self.world_size
        shards = len(self.urls)
        if shards >= slots:
            return [(shard, 0, 1) for shard in range(slot, shards, slots)]
        shard = slot % shards
        return [(shard, slot // shards, len(range(shard, slots, shards)))]

    def _samples(self, url: str, offset: int, step: int) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            for place, sample in enumerate(self.read(iter([{"url": url}]))):
                if place % step == offset:
                    yield place, sample
        except Exception as error:  # tarfile, gopen and curl each have their own
            fault = f"cannot be read to its end ({type(error).__name__}: {error})"
            raise ImageError(f"{url} {fault}; copy or build the shard again") from error

    def _image(self, sample: dict[str, Any], url: str) -> Tensor:
        # For this image only: the switch is the whole process's.
        switch = self.load_truncated or ImageFile.LOAD_TRUNCATED_IMAGES
        try:
            image = shard_samples.opened(shard_samples.image_file(sample))
            with replaced((ImageFile, "LOAD_TRUNCATED_IMAGES", switch)):
                shard_samples.check_range(image)
                image = shard_samples.rgb(image)
        except SampleError as error:
            flag = "; pass --load_truncated to use the part that is there, or build the shard without it"
            fault = f"{error}{flag if 'truncated' in str(error) else ''}"
            raise ImageError(str(Fault(url, sample["__key__"], fault))) from error
        return self.transform(image)

    def _labels(self, sample: dict[str, Any], url: str) -> np.ndarray:
        try:
            return shard_samples.labels(sample, self.label_file, self.classes, self.names_file)
        except SampleError as error:
            raise ImageError(str(Fault(url, sample["__key__"], str(error)))) from error


def _collate(batch: list[Any]) -> Batch:
    images, labels, places = zip(*batch, strict=True)
    return torch.stack(images), list(labels), list(places)


@torch.no_grad()
def encode_images(
    model: nn.Module,
    images: MultiLabelImages,
    *,
    device: str | torch.device,
    encode: Callable[[Tensor], Tensor] | None = None,
    autocast: Autocast = nullcontext,
    dtype: torch.dtype | None = None,
    batch_size: int = 64,
    workers: int = 0,
    together: bool = False,
) -> tuple[Tensor, list[np.ndarray]] | None:
    """(N, D) features as the model gives them, normalised, and each image's true classes.

    The model is an open_clip one in eval mode on ``device``; it runs inside the context that
    ``autocast`` makes, on input of ``dtype``, if not float32. With ``encode`` the features are what that
    gives for images instead. If the processes of torch.distributed's default group work ``together``,
    each encodes its share and all but rank 0 return None.

    Raises:
        ImageError: naming shard and sample, if an image or a label vector cannot be used.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    images.batch_size, images.rank, images.world_size = batch_size, rank, world_size
    encode = encode or (lambda pixels: F.normalize(model.encode_image(pixels), dim=-1))
    # A generator of its own: the loader must not draw from the random numbers of a training run.
    loader = DataLoader(images, batch_size=None, num_workers=workers, generator=torch.Generator())
    parts, labels, places, failure = [], [], [], None
    with tqdm(desc="Images", unit="image", disable=rank > 0) as bar:
        for batch in loader:
            if isinstance(batch, ImageError):
                failure = batch
                break
            pixels, batch_labels, batch_places = batch
            with autocast():
                parts.append(encode(pixels.to(device=device, dtype=dtype)).cpu())
            labels += batch_labels
            places += batch_places
            bar.update(len(batch_labels))
    if together:
        everyone = [None] * world_size if rank == 0 else None
        dist.gather_object((parts, labels, places, failure), everyone)
        if rank == 0:
            *columns, failures = zip(*everyone, strict=True)
            parts, labels, places = (list(chain.from_iterable(column)) for column in columns)
            failure = next(filter(None, failures), None)
    if failure is not None:
        raise failure
    if rank > 0:
        return None
    order = sorted(range(len(places)), key=places.__getitem__)
    features = torch.cat(parts)
    parts.clear()
    return features[torch.tensor(order)], [labels[i] for i in order]
