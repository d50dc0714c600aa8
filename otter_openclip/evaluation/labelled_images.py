"""Images and labels of a multi-label clip_benchmark webdataset, as features in a fixed order.

The order is that of the shards and of the samples in them, whatever the number of loader workers and
of ranks: what a metric depends on does not change with them. To read on through an incomplete image,
``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` is replaced while it is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ImageFile
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from webdataset.autodecode import ImageHandler

from otter_openclip.evaluation.classifier import Autocast
from otter_openclip.replacing import replaced

EXTENSIONS = ("webp", "png", "jpg", "jpeg")  # clip_benchmark's

Batch = tuple[Tensor, list[np.ndarray], list[tuple[int, int]]]  # images, labels, (shard, sample)


class ImageError(ValueError):
    """A sample or shard that cannot be used; the message names it."""


def is_multilabel(dataset: Any) -> bool:
    """Whether clip_benchmark opened ``dataset`` as a multi-label webdataset."""
    stages = getattr(dataset, "pipeline", [])
    return any("npy" in getattr(stage, "args", ()) for stage in stages)


class MultiLabelImages(IterableDataset):
    """Batches of images, labels and places of a multi-label webdataset, or the error that ends them.

    Each loader worker of each rank is a slot. With at least as many shards as slots a slot reads every
    slots-th shard; with fewer, the slots share the shards and each decodes its part of the samples.
    """

    def __init__(
        self, dataset: Any, transform: Callable, classes: int, *, load_truncated: bool = False
    ) -> None:
        """Take shards and tar reading, with its cache, from clip_benchmark's ``dataset``.

        ``transform`` is of PIL images to tensors, ``classes`` the length of the class list; with
        ``load_truncated`` what is missing of an incomplete image is grey instead of an error.
        """
        super().__init__()
        self.urls = list(dataset.pipeline[0].urls)
        functions = {getattr(getattr(s, "f", s), "__name__", ""): s for s in dataset.pipeline}
        self.read = next(stage for name, stage in functions.items() if "tarfile" in name)
        self.decode = ImageHandler("pil", extensions=EXTENSIONS)
        self.transform, self.classes, self.load_truncated = transform, classes, load_truncated
        self.batch_size, self.rank, self.world_size = 64, 0, 1

    def check(self) -> None:
        """Raise ImageError now, before anything expensive, for missing shards and unfit labels."""
        missing = [url for url in self.urls if "://" not in url and not Path(url).is_file()]
        if missing:
            raise ImageError(
                f"{len(missing)} of {len(self.urls)} shards are missing, first {missing[0]}; restore "
                "them or correct nshards.txt"
            )
        for url in self.urls:
            for _, sample in self._samples(url, 0, 1):
                self._labels(sample, f"{url}: sample {sample['__key__']}")
                return
        raise ImageError(f"no images in {len(self.urls)} shards, first {self.urls[0]}")

    def __iter__(self) -> Iterator[Batch | ImageError]:
        """Batches; an error is yielded, because a worker's exception would lose its text."""
        batch: list[Any] = []
        try:
            for shard, offset, step in self._shares():
                url = self.urls[shard]
                for place, sample in self._samples(url, offset, step):
                    where = f"{url}: sample {sample['__key__']}"
                    image, labels = self._image(sample, where), self._labels(sample, where)
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

    def _image(self, sample: dict[str, Any], where: str) -> Tensor:
        found = next((e for e in EXTENSIONS if e in sample), None)
        if found is None:
            raise ImageError(f"{where} has no image ({', '.join(EXTENSIONS)})")
        # For this image only: the switch is the whole process's.
        switch = self.load_truncated or ImageFile.LOAD_TRUNCATED_IMAGES
        try:
            with replaced((ImageFile, "LOAD_TRUNCATED_IMAGES", switch)):
                image = self.decode(found, sample[found])
        except Exception as error:  # PIL's decoders raise many types
            flag = "pass --load_truncated to use the part that is there, or "
            raise ImageError(
                f"{where}: the {found} cannot be decoded ({type(error).__name__}: {error}); "
                f"{flag if 'truncated' in str(error) else ''}build the shard without it"
            ) from error
        return self.transform(image)

    def _labels(self, sample: dict[str, Any], where: str) -> np.ndarray:
        if "npy" not in sample:
            raise ImageError(f"{where} has no npy with its label vector")
        try:
            vector = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ImageError(f"{where}: the npy cannot be read ({error})") from error
        if vector.shape != (self.classes,):
            raise ImageError(
                f"{where} has a label vector of shape {vector.shape}, but there are {self.classes} "
                "class names; classnames.txt must have one line for each entry"
            )
        labels = vector.nonzero()[0]
        if not (vector[labels] == 1).all():
            raise ImageError(f"{where} has a label vector with values other than 0 and 1")
        return labels.astype(np.int32)


def _collate(batch: list[Any]) -> Batch:
    images, labels, places = zip(*batch, strict=True)
    return torch.stack(images), list(labels), list(places)


@torch.no_grad()
def encode_images(
    model: nn.Module,
    images: MultiLabelImages,
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
    default group work ``together``, each encodes its share and all but rank 0 return None.

    Raises:
        ImageError: naming shard and sample, if an image or a label vector cannot be used.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    images.batch_size, images.rank, images.world_size = batch_size, rank, world_size
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
                encoded = model.encode_image(pixels.to(device=device, dtype=dtype))
                parts.append(F.normalize(encoded, dim=-1).cpu())
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
