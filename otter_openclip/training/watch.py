"""Training data that cannot make a step: refused before work begins, or at once, instead of never.

open_clip's webdataset loader looks for a batch for ever if the data hold none, and hardly says what it
passes over. What would end in a ZeroDivisionError or in an untrained model is looked at too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tarfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from typing import Any

from open_clip_train.data import (
    DataInfo,
    ResampledShards2,
    expand_urls,
    filter_no_caption_or_no_image,
    tarfile_to_samples_nothrow,
)
from open_clip_train.distributed import world_info_from_env
from torch.utils.data import get_worker_info

from otter_openclip.data.tables import header, rows

_IMAGES = {"jpg", "png", "jpeg", "webp"}
TABLES = (".csv", ".tsv")
_ROUNDS = 20  # of drawing from the shards without a usable sample
_NAMED = 5
_MAGIC = 257  # where a tar says that it is one


class NoBatchError(RuntimeError):
    """The data of a process hold no batch."""


def fault(args: Namespace) -> str | None:
    """What is wrong with ``--train-data`` as far as it shows without reading samples, or None."""
    if args.dataset_type == "synthetic" or (args.train_data is None and args.loss == "clip"):
        return None
    if not args.train_data:
        others = (getattr(args, name, None) for name in ("val_data", "imagenet_val", "imagenet_v2"))
        given = any(others) or args.zeroshot_data
        return None if given else "there are no data to train on; give --train-data"
    auto = args.dataset_type == "auto"
    if args.dataset_type == "csv" or (auto and args.train_data.endswith(TABLES)):
        return _table_fault(args)
    urls = expand_urls(args.train_data)[0]
    gone = [url for url in urls if "://" not in url and ":" not in url and not os.path.exists(url)]
    if len(gone) == len(urls):
        return f"--train-data {args.train_data}: no such file, first {gone[0]}"
    _, _, world = world_info_from_env()
    needed = max(1, args.workers) * world
    if len(urls) < needed and not args.dataset_resampled:
        processes = f" of each of {world} processes" if world > 1 else ""
        most = len(urls) // world
        fix = f"pass --workers {most}, or " if most else ""
        return (
            f"--train-data has {len(urls)} shards for the {max(1, args.workers)} --workers{processes}, "
            f"and each needs its own; {fix}build {needed}: otter-openclip data ... --shards {needed}"
        )
    return None


def _table_fault(args: Namespace) -> str | None:
    path, columns = args.train_data, {args.csv_img_key, args.csv_caption_key}
    if len(args.csv_separator) != 1:
        return None  # a pattern, for pandas
    try:
        if columns <= set(next(rows(path, args.csv_separator), (0, []))[1]):
            return None
        separator, names = header(path, sorted(columns))
    except FileNotFoundError:
        return f"--train-data {path}: no such file"
    except (ValueError, OSError) as error:
        return f"--train-data {error}"
    if columns <= set(names):
        return (
            f"--train-data {path} has its fields separated by {separator!r}; pass --csv-separator"
        )
    missing, listed = sorted(columns - set(names)), ", ".join(map(repr, names))
    flags = "--csv-img-key, --csv-caption-key and --csv-separator"
    return f"--train-data {path} has no column {missing[0]!r} but {listed}; see {flags}"


def cut_off(args: Namespace) -> list[str]:
    """Local shards of ``--train-data`` whose end is missing, of which loaders say nothing."""
    if not args.train_data or args.dataset_type not in ("webdataset", "auto"):
        return []
    urls = expand_urls(args.train_data)[0]
    return [url for url in urls if url.endswith(".tar") and os.path.isfile(url) and _is_cut(url)]


def _is_cut(path: str) -> bool:
    with open(path, "rb") as file:
        if tarfile.BLOCKSIZE > file.seek(0, os.SEEK_END):
            return False  # empty, or no tar at all: seen when it gives no sample
        whole_blocks = not file.tell() % tarfile.BLOCKSIZE
        file.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
        ends = file.read() == bytes(tarfile.BLOCKSIZE)
        file.seek(_MAGIC)
        return file.read(len(b"ustar")) == b"ustar" and not (whole_blocks and ends)


def check_loader(args: Namespace, train: DataInfo) -> None:
    """Raise ValueError if an epoch makes no step; with ``--loss clip`` only if that would crash."""
    batches = train.dataloader.num_batches
    if not batches and args.loss != "clip":
        raise ValueError(
            f"--train-data has {train.dataloader.num_samples} samples, less than a batch on each of "
            f"{args.world_size} processes; lower --batch-size {args.batch_size}"
        )
    if 0 < batches < args.accum_freq:
        raise ValueError(
            f"--accum-freq {args.accum_freq} is more than the {batches} batches of an epoch, so no step "
            "would be made; lower it or --batch-size"
        )


def watch(args: Namespace, train: DataInfo) -> None:
    """Let the webdataset pipeline end with NoBatchError when it has none, and log what it passes over.

    Of ``--loss clip`` nothing is logged.
    """
    if train.shared_epoch is None:
        return
    stages = train.dataloader.pipeline[0].dataset.pipeline
    if tarfile_to_samples_nothrow not in stages:
        return  # of --feature-cache, which has looked at everything
    source = stages[0]
    drawn = len(source.urls) if isinstance(source, ResampledShards2) else None
    seen = _Pass(args.batch_size, drawn, _sizes(args), log=args.loss != "clip")
    start = stages.index(tarfile_to_samples_nothrow)
    # shuffle, select, decode, rename, map, to_tuple, batched
    for place, stage in ((8, seen.batches), (4, seen.decoded), (3, seen.selected), (1, seen.read)):
        stages.insert(start + place, stage)
    stages.insert(start, seen.shards)


def _sizes(args: Namespace) -> dict[str, int]:
    """Samples of each shard, as far as sizes.json beside it knows them."""
    urls, sizes = expand_urls(args.train_data)[0], {}
    for folder in {os.path.dirname(url) for url in urls}:
        with contextlib.suppress(OSError, ValueError), open(f"{folder}/sizes.json") as file:
            sizes |= {os.path.join(folder, name): int(n) for name, n in json.load(file).items()}
    return sizes


@contextlib.contextmanager
def reason_given() -> Iterator[None]:
    """NoBatchError, of this process or a loader's, ends the command with its one line."""
    try:
        yield
    except NoBatchError as error:
        # A loader's process puts its traceback around the message.
        reason = str(error).rpartition(f"{NoBatchError.__name__}: ")[2].strip()
        raise SystemExit(f"error: {reason}") from error


class _Pass:
    """Stages that count what goes through them in a pass of one process over its shards."""

    def __init__(
        self, batch_size: int, drawn: int | None, sizes: dict[str, int], *, log: bool
    ) -> None:
        """``drawn`` is the number of shards that are drawn from without end, or None."""
        self.batch_size, self.drawn, self.sizes, self.log = batch_size, drawn, sizes, log
        self._begin()

    def _begin(self) -> None:
        self.opened: Counter[str] = Counter()
        self.gave: Counter[str] = Counter()
        self.without: Counter[str] = Counter()
        self.last = ""
        self.usable = self.chosen = self.good = self.made = 0

    def shards(self, source: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Before the shards are opened."""
        self._begin()
        for shard in source:
            turns = self.opened.total() / self.drawn if self.drawn else 0
            if turns > _ROUNDS and not self.good and not (self.usable and not self.chosen):
                raise NoBatchError(self._no_batch())
            self.last = shard["url"]
            self.opened[self.last] += 1
            yield shard
        self.last = ""

    def read(self, source: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """After the samples are read."""
        for sample in source:
            self.gave[sample["__url__"]] += 1
            if filter_no_caption_or_no_image(sample):
                self.usable += 1
            else:
                kinds = {name for name in sample if not name.startswith("__")}
                lacking = [] if "txt" in kinds else ["no .txt"]
                lacking += [] if kinds & _IMAGES else ["no image"]
                held = ", ".join(sorted(f".{kind}" for kind in kinds)[:_NAMED]) or "nothing"
                self.without[f"{' and '.join(lacking)} among {held}"] += 1
            yield sample

    def selected(self, source: Iterator[Any]) -> Iterator[Any]:
        """After samples without caption or image are out."""
        for sample in source:
            self.chosen += 1
            yield sample

    def decoded(self, source: Iterator[Any]) -> Iterator[Any]:
        """After unreadable images are out."""
        for sample in source:
            self.good += 1
            yield sample

    def batches(self, source: Iterator[Any]) -> Iterator[Any]:
        """After batches are made. A pass is also left when the epoch has its batches."""
        try:
            for batch in source:
                self.made += 1
                yield batch
            if not self.made:
                raise NoBatchError(self._no_batch())
        finally:
            if self.log and self.made and (reasons := self._reasons()):
                logging.warning(f"Samples passed over{_of_worker()}: {reasons}")

    def _reasons(self) -> str:
        listed = [f"{count} with {reason}" for reason, count in self.without.most_common(_NAMED)]
        if unreadable := self.chosen - self.good:
            listed.append(f"{unreadable} with an unreadable image or caption")
        read = sorted(set(self.opened) - {self.last})  # of the last one nothing is known yet
        if empty := [url for url in read if not self.gave[url]]:
            listed.append(
                f"all of {len(empty)} shards that gave none ({', '.join(empty[:_NAMED])})"
            )
        for url in [url for url in read if 0 < self.gave[url] < self._due(url)][:_NAMED]:
            listed.append(f"{self._due(url) - self.gave[url]} of {url}, which ends too early")
        return "; ".join(listed)

    def _due(self, url: str) -> int:
        return self.opened[url] * self.sizes.get(url, 0)

    def _no_batch(self) -> str:
        shards = ", ".join(sorted(self.opened)[:_NAMED]) or "no shard"
        reasons = self._reasons()
        return (
            f"--train-data gives no batch of {self.batch_size}{_of_worker()}: {self.good} usable "
            f"samples in {len(self.opened)} shards ({shards})"
            + (f"; passed over: {reasons}" if reasons else "; lower --batch-size or --workers")
        )


def _of_worker() -> str:
    info = get_worker_info()
    return "" if info is None else f" in loader process {info.id} of {info.num_workers}"
