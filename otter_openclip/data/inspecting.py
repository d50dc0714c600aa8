"""What `data inspect` finds: figures of shards, the faults of each sample, a contact sheet.

Training pairs are judged here; what is beside an evaluation set's shards is for `evaluation` to judge,
which `otter_openclip.inspect_command` hands in.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from heapq import heappush, heappushpop, nlargest
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from tqdm import tqdm

from otter_openclip.cli import positive
from otter_openclip.data.contact_sheet import FORMATS, THUMBNAIL, draw
from otter_openclip.data.pool import default_workers, ordered_map
from otter_openclip.data.sources import COMPRESSED, named
from otter_openclip.files import make_room, write_json
from otter_openclip.shards import read as shard_samples
from otter_openclip.shards.read import Fault, SampleError
from otter_openclip.shards.write import SIZES_FILE

SHOWN = 10
TARS = (".tar", *COMPRESSED)
STATISTICS = ("min", "median", "mean", "95%", "max")
SIZES = ("caption_characters", "caption_words", "labels_per_image")
SIZES += ("image_width", "image_height", "image_bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add = parser.add_argument
    text = "tars or folders of tars; braces and wildcards are expanded, as for --train-data"
    add("shards", nargs="+", metavar="SHARDS", help=text)
    text = "picture to write, of the format its suffix says; default contact_sheet.png here"
    add("--sheet", default="contact_sheet.png", metavar="FILE", help=text)
    add("--pictures", type=positive, default=48, metavar="N", help="images on it; default 48")
    add("--json", metavar="FILE", help="also write the figures and all faults there")
    workers = default_workers()
    add("--workers", type=positive, default=workers, metavar="N", help="default: one per CPU")


def inspect(args: argparse.Namespace, evaluation_set: Callable[[Path], Any]) -> int:
    """Run the command; ``evaluation_set`` has what lies beside a folder of an evaluation set's shards.

    That is an `evaluation.validator.Folder`, or None for a folder of training pairs.
    """
    paths = find_shards(args.shards)
    if Path(args.sheet).suffix.lower() not in FORMATS:
        raise ValueError(f"--sheet {args.sheet}: take one of {', '.join(FORMATS[:-1])}")
    for file in filter(None, (args.sheet, args.json)):
        make_room(Path(file))
    sets = {folder: evaluation_set(folder) for folder in dict.fromkeys(p.parent for p in paths)}
    jobs = [(path, sets[path.parent]) for path in paths]
    looks = ordered_map(partial(Look, pictures=args.pictures), jobs, args.workers)
    looks = list(tqdm(looks, "Reading shards", len(paths), unit="shard"))
    faults, remarks = judge(looks, sets)
    figures = summarise(looks)
    print(_table(figures, next((s.names for s in sets.values() if s and s.names), None)))
    for kind, listed in (("remark", remarks), ("fault", faults)):
        print(*(f"{kind}: {text}\n" for text in listed[:SHOWN]), sep="", end="")
    if len(faults) > SHOWN:
        print(f"... {len(faults)} faults in all{'' if args.json else '; --json FILE lists them'}")
    elif not faults:
        print("No faults: every sample can be read.")
    if args.json:
        rows = [dict(zip(("shard", "sample", "fault"), fault, strict=True)) for fault in faults]
        write_json(Path(args.json), {**figures, "faults": rows, "remarks": list(map(str, remarks))})
    pictures = chain.from_iterable(shard.pictures for shard in looks)
    chosen = nlargest(args.pictures, pictures, key=lambda picture: picture[0])
    if chosen:
        draw([(png, text) for _, png, text in chosen], Path(args.sheet))
        print(f"{len(chosen)} of them, drawn by lot: {args.sheet}")
    else:
        print(f"No image to draw: {args.sheet} is not written.")
    return 1 if faults else 0


def find_shards(patterns: Iterable[str]) -> list[Path]:
    """The tars that ``patterns`` stand for; FileNotFoundError if one of them stands for none."""
    shards: list[Path] = []
    for text in chain.from_iterable(map(braceexpand, patterns)):
        paths = []
        for name in filter(os.path.exists, named(text)):
            inside = glob.iglob(f"{glob.escape(name)}/**", recursive=True)  # not hidden ones
            tars = [path for path in inside if path.lower().endswith(TARS)]
            paths += tars if os.path.isdir(name) else [name]
        if not paths:
            raise FileNotFoundError(f"{text}: no such tar, or no .tar in it")
        shards += sorted(map(Path, paths), key=lambda p: (p.parent, len(p.name), p.name))
    return list(dict.fromkeys(shards))


class Look:
    """What a shard holds: numbers of each sample, and some pictures (lot, PNG, caption or labels)."""

    def __init__(self, job: tuple[Path, Any], pictures: int) -> None:
        """Read a shard, of an evaluation set or, if that is None, of training pairs."""
        self.path, self.set = job
        self.samples, self.turned, self._most = 0, 0, pictures
        self.sizes = {name: array("q") for name in SIZES}
        self.keys = array("Q")
        self.formats: Counter[str] = Counter()
        self.classes: set[int] = set()
        self.faults: list[Fault] = []
        self.pictures: list[tuple[Any, bytes, str]] = []
        try:
            for key, files in shard_samples.samples(self.path, strict=self.set is not None):
                digest = blake2b(key.encode(), digest_size=8).digest()
                self.keys.append(int.from_bytes(digest, "little"))
                self.samples, self._text = self.samples + 1, ""
                for read in (self._read_text, self._read_image):
                    try:
                        read(files)
                    except SampleError as error:
                        self.faults.append(Fault(str(self.path), key, str(error)))
        except OSError as error:
            self.faults.append(Fault(str(self.path), "", str(error)))

    def _read_text(self, files: Mapping[str, bytes]) -> None:
        kinds = [self.set.suffix] if self.set else [s for s in ("txt", "npy", "cls") if s in files]
        if not kinds:
            raise SampleError("neither caption (txt) nor labels (npy, cls)")
        if kinds[0] == "txt":
            self._text = shard_samples.caption(files)
            self.sizes["caption_characters"].append(len(self._text))
            self.sizes["caption_words"].append(len(self._text.split()))
        else:
            labels = shard_samples.labels(files, kinds[0], self.set and self.set.classes).tolist()
            names = self.set and self.set.names
            self._text = "; ".join(names[label] if names else str(label) for label in labels)
            self.sizes["labels_per_image"].append(len(labels))
            self.classes.update(labels)

    def _read_image(self, files: Mapping[str, bytes]) -> None:
        order = shard_samples.IMAGES if self.set else shard_samples.TRAINING_IMAGES
        content = shard_samples.image_file(files, order)
        self.sizes["image_bytes"].append(len(content))
        image = shard_samples.opened(content)
        format_name, decoded = f"{image.format} {image.mode}", shard_samples.rgb(image)
        self.formats[format_name] += 1
        self.sizes["image_width"].append(decoded.width)
        self.sizes["image_height"].append(decoded.height)
        self.turned += shard_samples.orientation(image) != 1
        lot, full = (self.keys[-1], self.samples), len(self.pictures) >= self._most
        if not full or lot > self.pictures[0][0]:  # the same ones every time
            decoded.thumbnail((THUMBNAIL, THUMBNAIL))
            decoded.save(png := io.BytesIO(), "PNG")
            (heappushpop if full else heappush)(self.pictures, (lot, png.getvalue(), self._text))
        shard_samples.check_range(image)


def judge(looks: Sequence[Look], sets: Mapping[Path, Any]) -> tuple[list[Fault], list[Fault]]:
    """All faults, and remarks on what neither training nor evaluation refuses."""
    faults, remarks = [fault for shard in looks for fault in shard.faults], []
    for folder, labelled in sets.items():
        shards = [shard for shard in looks if shard.path.parent == folder]
        # Keys of several folders may be alike: all number their samples from 0.
        every = np.concatenate([shard.keys for shard in shards])
        keys, counts = np.unique(every, return_counts=True)
        for shard in shards:
            if again := np.isin(shard.keys, keys[counts > 1]).sum():
                fault = Fault(
                    str(shard.path), "", f"{again} samples whose key occurs more than once"
                )
                (remarks if labelled else faults).append(fault)
            if none := shard.sizes["labels_per_image"].count(0):
                remarks.append(Fault(str(shard.path), "", f"{none} images with no positive label"))
        sizes = {shard.path.name: shard.samples for shard in shards}
        if labelled:
            faults += [*labelled.faults, *labelled.count_faults(sum(sizes.values()))]
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
        sizes = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        yield Fault(str(path), "", f"cannot be read as JSON ({error}); write it again")
        return
    if not isinstance(sizes, dict):
        yield Fault(str(path), "", "is no object of shard names and numbers of samples")
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
    formats = sum((shard.formats for shard in looks), Counter())
    figures["formats"] = dict(formats.most_common())
    if classes := set().union(*(shard.classes for shard in looks)):
        figures["classes_with_an_image"] = len(classes)
    if turned := sum(shard.turned for shard in looks):
        figures["turned_by_exif"] = turned
    return figures


def _table(figures: Mapping[str, Any], names: Sequence[str] | None) -> str:
    shards = "shards" if figures["shards"] > 1 else "shard"
    lines = [f"{figures['samples']} samples in {figures['shards']} {shards}"]
    if seen := figures.get("classes_with_an_image"):
        lines.append(f"{seen}{f' of {len(names)}' if names else ''} classes have an image")
    if turned := figures.get("turned_by_exif"):
        lines.append(f"{turned} images are turned by EXIF, which training ignores")
    rows = {name: value for name, value in figures.items() if isinstance(value, dict)}
    formats = ", ".join(f"{count} {name}" for name, count in rows.pop("formats").items())
    lines.append(f"{'':20}" + "".join(f"{name:>10}" for name in STATISTICS))
    for name, row in rows.items():
        values = "".join(f"{round(value, 1):>10.10g}" for value in row.values())
        lines.append(f"{name.replace('_', ' '):20}{values}")
    return "\n".join([*lines, f"formats: {formats or 'none'}"])
