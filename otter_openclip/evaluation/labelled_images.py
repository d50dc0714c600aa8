"""Images and labels of a labelled clip_benchmark webdataset, as features in a fixed order.

The order is that of the shards and of the samples in them, whatever the number of loader workers and
of ranks: what a metric depends on does not change with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from otter_openclip.evaluation.classifier import Autocast
from otter_openclip.shards import read as shard_samples
from otter_openclip.shards.read import Fault, SampleError

Batch = tuple[Tensor, list[np.ndarray], list[tuple[int, int]]]  # images, labels, (shard, sample)


class ImageError(ValueError):
    """A sample or shard that cannot be used; the message names it.

    That of a loader's process arrives as the end of a traceback in a text, which is cut off here.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rpartition(f"{ImageError.__name__}: ")[2].rstrip())


def label_suffix(dataset: Any) -> str | None:
    """What clip_benchmark reads beside images: ``npy``, ``cls`` or ``txt``; None of no webdataset."""
    read = [
        name for stage in getattr(dataset, "pipeline", ()) for name in getattr(stage, "args", ())
    ]
    return next((suffix for suffix in ("npy", "cls", "txt") if suffix in read), None)


def is_multilabel(dataset: Any) -> bool:
    """Whether clip_benchmark opened ``dataset`` as a multi-label webdataset."""
    return label_suffix(dataset) == "npy"


class CheckedShards:
    """Reads the shards of a webdataset that clip_benchmark opened; a fault is named by shard and sample.

    It can take the place of webdataset's reading in the data set, which does not see a tar's garbled
    end, and hands on labels that are none of the classes. Shards at addresses are read by webdataset.
    """

    def __init__(self, dataset: Any) -> None:
        self.urls = list(dataset.pipeline[0].urls)
        self.suffix = label_suffix(dataset)
        self.classes = None if dataset.classes is None else len(dataset.classes)
        names = [getattr(getattr(stage, "f", stage), "__name__", "") for stage in dataset.pipeline]
        self.position = next(i for i, name in enumerate(names) if "tarfile" in name)
        self.stock = dataset.pipeline[self.position]

    def samples(self, url: str) -> Iterator[dict[str, Any]]:
        """The samples of a shard as webdataset gives them before it decodes them."""
        try:
            if not os.path.exists(url):
                yield from self.stock(iter([{"url": url}]))
                return
            for key, files in shard_samples.samples(url, strict=True):
                yield {"__key__": key, "__url__": url, **files}
        except Exception as error:  # tarfile and what opens addresses have their own
            raise ImageError(str(Fault(url, "", str(error)))) from error

    def labels(self, sample: dict[str, Any]) -> np.ndarray:
        """The true classes of a sample."""
        return shard_samples.labels(sample, self.suffix, self.classes)

    def read_all(self) -> list[np.ndarray]:
        """Check every sample, and that there are any, with a bar; the true classes of each."""
        checked = tqdm(self({"url": url} for url in self.urls), desc="Checking", unit="sample")
        labels = [self.labels(sample) for sample in checked]
        self.check_count(len(labels))
        return labels

    def check_count(self, samples: int) -> None:
        """Raise ImageError if there are no samples."""
        if not samples:
            raise ImageError(f"no images in {len(self.urls)} shards, first {self.urls[0]}")

    def __call__(self, shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """All samples of ``shards``, checked, as a stage of the data set."""
        for shard in shards:
            for sample in self.samples(shard["url"]):
                try:
                    if self.suffix == "txt":
                        shard_samples.caption(sample)
                    else:
                        self.labels(sample)
                    shard_samples.check_image(shard_samples.image_file(sample))
                except SampleError as error:
                    raise fault_of(sample, error) from error
                yield sample


def fault_of(sample: dict[str, Any], error: SampleError) -> ImageError:
    """The error of one sample, which says where it is."""
    return ImageError(str(Fault(sample["__url__"], sample["__key__"], str(error))))


class LabelledImages(IterableDataset):
    """Batches of images, labels and places of a labelled webdataset.

    Each loader worker of each rank is a slot. With at least as many shards as slots a slot reads every
    slots-th shard; with fewer, the slots share the shards and each decodes its part of the samples.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Tensor]) -> None:
        """The shards and classes of clip_benchmark's ``dataset``, its images made by ``transform``."""
        super().__init__()
        self.shards, self.transform = CheckedShards(dataset), transform
        self.batch_size, self.rank, self.world_size = 64, 0, 1

    def __iter__(self) -> Iterator[Batch]:
        batch: list[Any] = []
        for shard, offset, step in self._shares():
            for place, sample in enumerate(self.shards.samples(self.shards.urls[shard])):
                if place % step != offset:
                    continue
                try:
                    batch.append((self._image(sample), self.shards.labels(sample), (shard, place)))
                except SampleError as error:
                    raise fault_of(sample, error) from error
                if len(batch) == self.batch_size:
                    yield _collate(batch)
                    batch = []
        if batch:
            yield _collate(batch)

    def _shares(self) -> list[tuple[int, int, int]]:
        """This slot's (shard, first sample, step)."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        slot, slots = worker * self.world_size + self.rank, workers * self.world_size
        shards = len(self.shards.urls)
        if shards >= slots:
            return [(shard, 0, 1) for shard in range(slot, shards, slots)]
        shard = slot % shards
        return [(shard, slot // shards, len(range(shard, slots, shards)))]

    def _image(self, sample: dict[str, Any]) -> Tensor:
        image = shard_samples.opened(shard_samples.image_file(sample))
        shard_samples.check_range(image)
        return self.transform(shard_samples.rgb(image))


def _collate(batch: list[Any]) -> Batch:
    images, labels, places = zip(*batch, strict=True)
    return torch.stack(images), list(labels), list(places)


@torch.no_grad()
def encode_images(
    model: nn.Module,
    images: LabelledImages,
    *,
    device: str | torch.device,
    autocast: Autocast = nullcontext,
    dtype: torch.dtype | None = None,
    batch_size: int = 64,
    workers: int = 0,
    together: bool = False,
) -> tuple[Tensor, list[np.ndarray]] | None:
    """(N, D) features as the model gives them, normalised, and each image's true classes.

    The model is an open_clip one in eval mode on ``device``; it runs inside the context that
    ``autocast`` makes, on input of ``dtype``, if not float32. If the processes of torch.distributed's
    default group work ``together``, each encodes its share and all but rank 0 return None. ImageError
    names shard and sample of what cannot be used.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    images.batch_size, images.rank, images.world_size = batch_size, rank, world_size
    # A generator of its own: the loader must not draw from the random numbers of a training run.
    loader = DataLoader(images, batch_size=None, num_workers=workers, generator=torch.Generator())
    parts, labels, places, failure = [], [], [], None
    try:
        with tqdm(desc="Images", unit="image", disable=rank > 0) as bar:
            for pixels, batch_labels, batch_places in loader:
                with autocast():
                    features = model.encode_image(pixels.to(device=device, dtype=dtype))
                    parts.append(F.normalize(features, dim=-1).cpu())
                labels += batch_labels
                places += batch_places
                bar.update(len(batch_labels))
    except ImageError as error:
        failure = error
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
    images.shards.check_count(len(places))
    order = sorted(range(len(places)), key=places.__getitem__)
    features = torch.cat(parts)
    parts.clear()
    return features[torch.tensor(order)], [labels[i] for i in order]
