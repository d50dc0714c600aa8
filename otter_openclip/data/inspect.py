"""Look at webdataset shards: counts, caption lengths, image sizes, unreadable samples, a contact sheet.

Takes shards of image-caption pairs and clip_benchmark's zero-shot sets. Every image is decoded. The exit
code is 1 if something is wrong with the shards, and every fault is named.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import logging
import math
import os
import re
import textwrap
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import nsmallest
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
from PIL import Image
from tqdm import tqdm

from otter_openclip.data import sources
from otter_openclip.data.building import STATE_FOLDER
from otter_openclip.data.decoding import STOCK_FORMATS, UndecodableImageError, decode
from otter_openclip.data.options import positive
from otter_openclip.data.pool import default_workers
from otter_openclip.data.pool import ordered_map as parallel_map
from otter_openclip.evaluation import prompts
from otter_openclip.files import write_json, written_whole

THUMBNAIL = 160
COLUMNS = 8
_SHOWN_FAULTS = 10
_KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's, which imports torch
_STOCK_SUFFIXES = (*dict.fromkeys(STOCK_FORMATS.values()), "jpeg")


@dataclass
class Look:
    """What one shard holds, one entry a sample in the arrays."""

    path: str
    samples: int = 0
    characters: array = field(default_factory=lambda: array("q"))
    words: array = field(default_factory=lambda: array("q"))
    labels: array = field(default_factory=lambda: array("q"))
    widths: array = field(default_factory=lambda: array("q"))
    heights: array = field(default_factory=lambda: array("q"))
    image_bytes: array = field(default_factory=lambda: array("q"))
    formats: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[str, str]] = field(default_factory=list)
    keys: array = field(default_factory=lambda: array("Q"))
    thumbnails: list[tuple[int, bytes, Any]] = field(default_factory=list)
    classes: set[int] = field(default_factory=set)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="tars or folders of tars; braces and wildcards are expanded, as for --train-data",
    )
    parser.add_argument(
        "--sheet",
        default="contact_sheet.png",
        metavar="FILE",
        help="picture to write; default contact_sheet.png here",
    )
    parser.add_argument(
        "--pictures", type=positive, default=48, metavar="N", help="images on it; default 48"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="also write the figures and all faults there"
    )
    parser.add_argument(
        "--workers",
        type=positive,
        default=default_workers(),
        metavar="N",
        help="default: one per CPU",
    )


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    paths = find_shards(args.shards)
    looks = parallel_map(partial(look, pictures=args.pictures), paths, args.workers)
    looks = list(tqdm(looks, "Reading shards", len(paths), unit="shard"))
    faults = [(shard.path, *fault) for shard in looks for fault in shard.faults]
    faults += _across(looks) + _counted_otherwise(looks)
    names = _class_names(paths[0])
    faults += _outside(looks, names) + prompts.faults(paths[0].parent.parent)
    figures = summarise(looks)
    print(_table(figures, names))
    for path, key, fault in faults[:_SHOWN_FAULTS]:
        print(f"fault: {path}: {key + ': ' if key else ''}{fault}")
    if len(faults) > _SHOWN_FAULTS:
        print(
            f"... {len(faults)} faults in all" + ("" if args.json else "; --json FILE lists them")
        )
    elif not faults:
        print("No faults: every sample can be read.")
    if args.json:
        rows = [dict(zip(("shard", "sample", "fault"), fault, strict=True)) for fault in faults]
        write_json(Path(args.json), {**figures, "faults": rows})
    chosen = nsmallest(args.pictures, (t for shard in looks for t in shard.thumbnails))
    if chosen:
        draw(chosen, names, Path(args.sheet))
        print(f"{len(chosen)} of them, drawn by lot: {args.sheet}")
    return 1 if faults else 0


def find_shards(patterns: Iterable[str]) -> list[Path]:
    """The tars that ``patterns`` stand for.

    Raises:
        FileNotFoundError: if one of them stands for none.
    """
    found: list[Path] = []
    for pattern in patterns:
        for text in braceexpand.braceexpand(pattern):
            names = glob.glob(text) if glob.has_magic(text) else [text]
            paths = []
            for path in map(Path, names):
                if path.is_dir():
                    paths += [p for p in path.rglob("*.tar") if STATE_FOLDER not in p.parts]
                elif path.exists():
                    paths.append(path)
            if not paths:
                raise FileNotFoundError(f"{text}: no such tar, or no .tar in it")
            found += sorted(paths, key=lambda p: (p.parent, len(p.name), p.name))
    return list(dict.fromkeys(found))


def look(path: Path, pictures: int) -> Look:
    """Read one shard; ``pictures`` thumbnails are kept, by lot, the same ones every time."""
    result = Look(str(path))
    try:
        with open(path, "rb") as file:
            for key, files in _samples(path):
                result.samples += 1
                result.keys.append(int.from_bytes(sources.digest(key), "little"))
                content = {
                    suffix: os.pread(file.fileno(), m.size, m.offset) for suffix, m in files.items()
                }
                _look_at(key, content, result, pictures)
    except OSError as error:
        result.faults.append(("", str(error).removeprefix(f"{path}: ")))
    result.thumbnails = nsmallest(pictures, result.thumbnails)
    return result


def _samples(path: Path) -> Iterator[tuple[str, dict[str, sources.Member]]]:
    """Groups of consecutive members with one key, as webdataset forms them."""
    current, files = None, {}
    for member in sources.members(str(path)):
        match = _KEY_AND_SUFFIX.match(member.name)
        if match is None:
            continue
        key, suffix = match.groups()
        if key != current or suffix.lower() in files:
            if current is not None:
                yield current, files
            current, files = key, {}
        files[suffix.lower()] = member
    if current is not None:
        yield current, files


def _look_at(key: str, content: dict[str, bytes], result: Look, pictures: int) -> None:
    suffix = next((s for s in _STOCK_SUFFIXES if s in content), None)
    beside = _beside(key, content, result)
    if suffix is None:
        result.faults.append((key, f"no image ({', '.join(_STOCK_SUFFIXES)}) among its files"))
        return
    data = content[suffix]
    result.image_bytes.append(len(data))
    try:
        image = decode(data)
        format_name = image.format
        image = image.convert("RGB")
    except UndecodableImageError as error:
        result.faults.append((key, f"unreadable image: {error}"))
        return
    result.widths.append(image.width)
    result.heights.append(image.height)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as header:
            result.formats[f"{format_name} {header.mode}"] += 1
    lot = int.from_bytes(sources.digest(f"lot {result.path} {key}"), "little")
    kept = result.thumbnails
    if len(kept) < 2 * pictures or lot < max(kept[:pictures])[0]:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        kept.append((lot, buffer.getvalue(), beside))
        if len(kept) >= 4 * pictures:
            kept[:] = nsmallest(pictures, kept)


def _beside(key: str, content: dict[str, bytes], result: Look) -> str | list[int] | None:
    """The caption or labels; their figures and faults go into ``result``."""
    if "txt" in content:
        try:
            caption = content["txt"].decode()
        except UnicodeDecodeError:
            result.faults.append((key, "caption is not UTF-8"))
            return None
        result.characters.append(len(caption))
        result.words.append(len(caption.split()))
        if not caption.strip():
            result.faults.append((key, "empty caption"))
        return caption
    try:
        if "npy" in content:
            labels = np.flatnonzero(np.load(io.BytesIO(content["npy"]))).tolist()
        elif "cls" in content:
            labels = [int(content["cls"])]
        else:
            result.faults.append((key, "neither caption (txt) nor labels (npy, cls)"))
            return None
    except ValueError as error:
        result.faults.append((key, f"unreadable labels: {error}"))
        return None
    result.labels.append(len(labels))
    result.classes.update(labels)
    if not labels:
        result.faults.append((key, "no positive label"))
    return labels


def _across(looks: Sequence[Look]) -> list[tuple[str, str, str]]:
    keys = [np.asarray(shard.keys, np.uint64) for shard in looks]
    unique, counts = np.unique(np.concatenate(keys), return_counts=True)
    repeated = unique[counts > 1]
    faults = []
    for shard, own in zip(looks, keys, strict=True):
        again = int(np.isin(own, repeated).sum())
        if again:
            faults.append((shard.path, "", f"{again} samples whose key occurs more than once"))
    return faults


def _counted_otherwise(looks: Sequence[Look]) -> list[tuple[str, str, str]]:
    """Disagreement with sizes.json and nshards.txt beside the shards."""
    faults = []
    folders: dict[Path, list[Look]] = {}
    for shard in looks:
        folders.setdefault(Path(shard.path).parent, []).append(shard)
    for folder, shards in folders.items():
        sizes_file, count_file = folder / "sizes.json", folder / "nshards.txt"
        if sizes_file.exists():
            sizes = json.loads(sizes_file.read_text(encoding="utf-8"))
            for shard in shards:
                listed = sizes.get(Path(shard.path).name)
                if listed != shard.samples:
                    fault = f"{shard.samples} samples, where sizes.json has {listed}"
                    faults.append((shard.path, "", fault))
        if count_file.exists():
            listed = int(count_file.read_text())
            gone = [n for n in range(listed) if not (folder / f"{n}.tar").exists()]
            faults += [
                (str(folder / f"{n}.tar"), "", "counted in nshards.txt but gone") for n in gone
            ]
    return faults


def _outside(looks: Sequence[Look], names: list[str] | None) -> list[tuple[str, str, str]]:
    if names is None:
        return []
    return [
        (
            shard.path,
            "",
            f"label {max(shard.classes)}, where classnames.txt has {len(names)} classes",
        )
        for shard in looks
        if shard.classes and max(shard.classes) >= len(names)
    ]


def _class_names(shard: Path) -> list[str] | None:
    path = shard.parent.parent / "classnames.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else None


def summarise(looks: Sequence[Look]) -> dict[str, Any]:
    """The figures of all shards: counts, and quantiles of what has a size."""
    figures: dict[str, Any] = {
        "shards": len(looks),
        "samples": sum(shard.samples for shard in looks),
        "samples_per_shard": _quantiles([shard.samples for shard in looks]),
        "formats": dict(sum((shard.formats for shard in looks), Counter()).most_common()),
    }
    for name, attribute in (
        ("caption_characters", "characters"),
        ("caption_words", "words"),
        ("labels_per_image", "labels"),
        ("image_width", "widths"),
        ("image_height", "heights"),
        ("image_bytes", "image_bytes"),
    ):
        values = np.concatenate([np.asarray(getattr(shard, attribute)) for shard in looks])
        if len(values):
            figures[name] = _quantiles(values)
    classes = set().union(*(shard.classes for shard in looks))
    if classes:
        figures["classes_with_an_image"] = len(classes)
    return figures


def _quantiles(values: Sequence[int] | np.ndarray) -> dict[str, float]:
    low, median, high, top = np.quantile(values, [0, 0.5, 0.95, 1]).tolist()
    return {"min": low, "median": median, "mean": float(np.mean(values)), "95%": high, "max": top}


def _table(figures: dict[str, Any], names: list[str] | None) -> str:
    shards = figures["shards"]
    lines = [f"{figures['samples']} samples in {shards} shard{'s' if shards > 1 else ''}"]
    if "classes_with_an_image" in figures:
        of = f" of {len(names)}" if names is not None else ""
        lines.append(f"{figures['classes_with_an_image']}{of} classes have an image")
    rows = {name: value for name, value in figures.items() if isinstance(value, dict)}
    formats = rows.pop("formats")
    lines.append(f"{'':20}{'min':>10}{'median':>10}{'mean':>10}{'95%':>10}{'max':>10}")
    for name, row in rows.items():
        values = "".join(f"{value:>10.10g}" for value in (round(v, 1) for v in row.values()))
        lines.append(f"{name.replace('_', ' '):20}{values}")
    listed = ", ".join(f"{count} {name}" for name, count in formats.items())
    return "\n".join([*lines, f"formats: {listed or 'none'}"])


def draw(chosen: Sequence[tuple[int, bytes, Any]], names: Sequence[str] | None, path: Path) -> None:
    """Draw the contact sheet: thumbnails with what belongs to them underneath."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(COLUMNS, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(1.7 * columns, 2.3 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (_, thumbnail, beside) in zip(axes.flat, chosen, strict=False):
        axis.imshow(Image.open(io.BytesIO(thumbnail)))
        axis.text(
            *(0.5, -0.05, _under(beside, names)),
            transform=axis.transAxes,
            ha="center",
            va="top",
            fontsize=7,
            parse_math=False,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks show as boxes
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        with written_whole(path) as file:
            figure.savefig(file, format="png", dpi=110, facecolor="white")
    pyplot.close(figure)


def _under(beside: Any, names: Sequence[str] | None) -> str:
    if beside is None:
        return ""
    if isinstance(beside, list):
        beside = "; ".join(
            names[label] if names is not None and label < len(names) else str(label)
            for label in beside
        )
    text = textwrap.shorten(beside, 84, placeholder=" …")
    return "\n".join(textwrap.wrap(text, 22))
