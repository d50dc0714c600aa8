"""What shards hold and what is wrong with them: figures, the faults of each sample, some pictures."""

from __future__ import annotations

import glob
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from otter_openclip.data.sources import COMPRESSED
from otter_openclip.pages import THUMBNAIL
from otter_openclip.shards import read as shard_samples
from otter_openclip.shards.read import Fault, SampleError
from otter_openclip.shards.write import SIZES_FILE

TARS = (".tar", *COMPRESSED)
STATISTICS = ("min", "median", "mean", "95%", "max")
SIZES = ("caption_characters", "caption_words", "labels_per_image")
SIZES += ("image_width", "image_height", "image_bytes")


def find_shards(patterns: Iterable[str]) -> list[Path]:
    """The tars that ``patterns`` stand for; FileNotFoundError if one of them stands for none."""
    shards: list[Path] = []
    for text in chain.from_iterable(map(braceexpand, patterns)):
        paths = []
        for name in [text] if os.path.exists(text) else glob.glob(text):
            inside = glob.iglob(f"{glob.escape(name)}/**", recursive=True)  # not hidden ones
            tars = [path for path in inside if path.lower().endswith(TARS)]
            paths += tars if os.path.isdir(name) else [name]
        if not paths:
            raise FileNotFoundError(f"{text}: no such tar, or no .tar in it")
        shards += sorted(map(Path, paths), key=lambda p: (p.parent, len(p.name), p.name))
    return list(dict.fromkeys(shards))


class Look:
    """What a shard holds: numbers of each sample, and small pictures of the first, with their text."""

    def __init__(self, job: tuple[Path, Any], pictures: int) -> None:
        """Read a shard, of an evaluation set or, if that is None, of training pairs."""
        self.path, self.set = job
        self.samples, self._most = 0, pictures
        self.sizes = {name: array("q") for name in SIZES}
        self.faults: list[Fault] = []
        self.pictures: list[tuple[Any, str]] = []
        try:
            for key, files in shard_samples.samples(self.path, strict=self.set is not None):
                self.samples += 1
                try:
                    self._read(files)
                except SampleError as error:
                    self.faults.append(Fault(str(self.path), key, str(error)))
        except OSError as error:
            self.faults.append(Fault(str(self.path), "", str(error)))

    def _read(self, files: Mapping[str, bytes]) -> None:
        text = self._read_text(files)
        order = shard_samples.IMAGES if self.set else shard_samples.TRAINING_IMAGES
        content = shard_samples.image_file(files, order)
        image = shard_samples.opened(content)
        decoded = shard_samples.rgb(image)
        self.sizes["image_bytes"].append(len(content))
        self.sizes["image_width"].append(decoded.width)
        self.sizes["image_height"].append(decoded.height)
        if len(self.pictures) < self._most:
            decoded.thumbnail((THUMBNAIL, THUMBNAIL))
            self.pictures.append((decoded, text))
        shard_samples.check_range(image)

    def _read_text(self, files: Mapping[str, bytes]) -> str:
        kinds = [self.set.suffix] if self.set else [s for s in ("txt", "npy", "cls") if s in files]
        if not kinds:
            raise SampleError("neither caption (txt) nor labels (npy, cls)")
        if kinds[0] == "txt":
            text = shard_samples.caption(files)
            self.sizes["caption_characters"].append(len(text))
            self.sizes["caption_words"].append(len(text.split()))
            return text
        labels = shard_samples.labels(files, kinds[0], self.set and self.set.classes).tolist()
        self.sizes["labels_per_image"].append(len(labels))
        names = self.set and self.set.names
        return "; ".join(names[label] if names else str(label) for label in labels)


def judge(looks: Sequence[Look], sets: Mapping[Path, Any]) -> tuple[list[Fault], list[Fault]]:
    """All faults, and remarks on what neither training nor evaluation refuses."""
    faults, remarks = [fault for shard in looks for fault in shard.faults], []
    for shard in looks:
        if none := shard.sizes["labels_per_image"].count(0):
            remarks.append(Fault(str(shard.path), "", f"{none} images with no positive label"))
    for folder, labelled in sets.items():
        sizes = {shard.path.name: shard.samples for shard in looks if shard.path.parent == folder}
        if labelled:
            faults += labelled.faults
            if labelled.shards and not any(sizes.values()):
                faults.append(Fault(str(folder), "", f"no images in {len(sizes)} shards"))
            remarks += labelled.remarks
        else:
            faults += size_faults(folder, sizes)
    return faults, remarks


def size_faults(folder: Path, counted: Mapping[str, int]) -> Iterator[Fault]:
    """What is wrong with a ``sizes.json``, by the samples ``counted`` in shards of its folder."""
    path = folder / SIZES_FILE
    if not path.exists():
        return
    try:
        sizes = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        fault = f"is not JSON of shard names and numbers of samples ({error}); write it again"
        yield Fault(str(path), "", fault)
        return
    for name, samples in counted.items():
        if (listed := sizes.get(name)) != samples:
            text = f"{samples} samples, where {SIZES_FILE} has {listed!r}"
            yield Fault(str(folder / name), "", text)
    for name in sizes.keys() - counted.keys():
        if not (folder / name).exists():
            yield Fault(str(folder / name), "", f"counted in {SIZES_FILE} but gone")


def summarise(looks: Sequence[Look]) -> dict[str, Any]:
    """The figures of all shards: counts, and quantiles of what has a size."""
    figures = {"shards": len(looks), "samples": sum(shard.samples for shard in looks)}
    sizes = {"samples_per_shard": np.array([shard.samples for shard in looks])}
    sizes |= {name: np.concatenate([shard.sizes[name] for shard in looks]) for name in SIZES}
    for name, v in sizes.items():
        if len(v):
            values = v.min(), np.median(v), v.mean(), np.quantile(v, 0.95), v.max()
            figures[name] = dict(zip(STATISTICS, map(float, values), strict=True))
    return figures


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text, a row each."""
    lines = [f"{figures['samples']} samples in {figures['shards']} shards"]
    lines.append(f"{'':20}" + "".join(f"{name:>10}" for name in STATISTICS))
    for name, row in figures.items():
        if isinstance(row, dict):
            values = "".join(f"{round(value, 1):>10.10g}" for value in row.values())
            lines.append(f"{name.replace('_', ' '):20}{values}")
    return "\n".join(lines)
