"""What is refused before a run, and what ends one that would go on for nothing: no data, a NaN."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
import webdataset as wds
from open_clip_train.data import DataInfo, ResampledShards2, expand_urls
from torch import nn
from torch.utils.data import get_worker_info

from otter_openclip.captions import cut_alike
from otter_openclip.frozen.loader import student_tokenizer
from otter_openclip.shards.read import CAPTIONS_LOOKED_AT, first_captions
from otter_openclip.training.flags import in_shards

# Shards that are drawn without a batch: twice all of them, and more than fill webdataset's buffer.
_ROUNDS, _BUFFER = 2, 2000
_NAMED = 5
_HOW_TO_GO_ON = (
    "nothing was saved of this epoch. Fix: a lower --lr, a longer --warmup or --grad-clip-norm; with "
    "--precision amp or fp16 another precision; then --resume latest goes on from the last checkpoint"
)


class NoBatchError(RuntimeError):
    """The data of a process hold no batch, for which webdataset would look for ever."""


@contextlib.contextmanager
def no_batch_in_one_line() -> Iterator[None]:
    """NoBatchError, of this process or a loader's, ends the command with its one line."""
    try:
        yield
    except NoBatchError as error:
        # A loader's process puts its traceback around the message.
        reason = str(error).rpartition(f"{NoBatchError.__name__}: ")[2].strip()
        raise SystemExit(f"error: {reason}") from error


def check_loggers_installed(args: Namespace) -> None:
    """Raise ValueError for a logger that open_clip would miss after ``--feature-cache`` is filled."""
    for name in ("wandb", "tensorboard"):
        # A folder of that name, as wandb makes one, is found too, without an origin.
        there = getattr(importlib.util.find_spec(name), "origin", None)
        if there is None and (name in args.report_to or "all" in args.report_to):
            fault = f"--report-to {args.report_to}: {name} is not installed"
            raise ValueError(f"{fault}; pip install {name}, or drop it")


def check_locks(args: Namespace, model: nn.Module) -> None:
    """Lock the towers, as ``main`` does again, to say in one line what it could not or would train.

    Raises:
        ValueError: if open_clip cannot lock this model so, or nothing but the scale is left to train.
    """
    for tower, how in {
        "image": {"unlocked_groups": args.lock_image_unlocked_groups},
        "text": {
            "unlocked_layers": args.lock_text_unlocked_layers,
            "freeze_layer_norm": args.lock_text_freeze_layer_norm,
        },
    }.items():
        try:
            if getattr(args, f"lock_{tower}"):
                getattr(model, f"lock_{tower}_tower")(**how)
        except (AssertionError, AttributeError, LookupError, RuntimeError) as error:
            raise ValueError(
                f"--lock-{tower}: open_clip cannot lock this tower of --model {args.model} with {how} "
                f"({error!r}); change that, or drop --lock-{tower}"
            ) from error
    trained = (n for n, p in model.named_parameters() if p.requires_grad and "logit_" not in n)
    if args.train_data and next(trained, None) is None:
        raise ValueError(
            f"--lock-image and --lock-text leave nothing of --model {args.model} to train but its "
            "scale; drop one, or leave layers unlocked (--lock-image-unlocked-groups)"
        )


def tell_cut_texts(
    args: Namespace, train: DataInfo | None, texts: Mapping[str, Iterable[str]]
) -> None:
    """Log which of ``texts``, by what they are, and of the first captions are equal once cut off.

    ``--feature-cache`` looks at captions when it encodes them.
    """
    texts = dict(texts)
    if train is not None and args.feature_cache is None and in_shards(args):
        texts["captions"] = first_captions(expand_urls(args.train_data)[0])
    elif train is not None and args.feature_cache is None:
        captions = getattr(train.dataloader.dataset, "captions", ())
        texts["captions"] = map(str, captions[:CAPTIONS_LOOKED_AT])
    tokenizer = student_tokenizer(args) if texts else None
    for what, each in texts.items():
        if remark := cut_alike(what, each, tokenizer):
            logging.warning(remark)


def check_loader(args: Namespace, train: DataInfo) -> None:
    """Raise ValueError if an epoch makes no step, of which open_clip would say nothing."""
    batches = train.dataloader.num_batches
    if not batches:
        raise ValueError(
            f"--train-data has {train.dataloader.num_samples} samples, less than a batch on each of "
            f"{args.world_size} processes; lower --batch-size {args.batch_size}"
        )
    if batches < args.accum_freq:
        raise ValueError(
            f"--accum-freq {args.accum_freq} is more than the {batches} batches of an epoch, so no step "
            "would be made; lower it or --batch-size"
        )


def check_validation(args: Namespace) -> None:
    """Raise ValueError for a shard of ``--val-data`` that is gone, which may cost the first epoch."""
    for shard in expand_urls(args.val_data)[0] if in_shards(args, "val_data") else ():
        if ":" not in shard and not os.path.exists(shard):
            raise ValueError(f"--val-data {args.val_data}: {shard}: no such file; correct the path")


def settle_warmup(args: Namespace, train: DataInfo) -> None:
    """Without ``--warmup`` it is a tenth of the run, where open_clip has 10,000 steps.

    Raises:
        ValueError: if it is longer than the run, but with ``--loss clip``, where that is logged.
    """
    steps = train.dataloader.num_batches // args.accum_freq * args.epochs
    if args.warmup is None:
        args.warmup = steps // 10
        logging.info(f"Warmup: {args.warmup} of the run's {steps} steps; --warmup N sets it")
    elif args.warmup > steps and not args.skip_scheduler:
        fault = f"--warmup {args.warmup} is longer than the run's {steps} steps"
        fault += f", so its learning rate stays below --lr {args.lr}; lower it"
        if args.loss != "clip":
            raise ValueError(fault)
        logging.warning(fault)


def watch_passes(args: Namespace, train: DataInfo) -> None:
    """Let open_clip's webdataset pipeline end with NoBatchError if a pass over its shards has none."""
    if train.shared_epoch is None:
        return
    stages = train.dataloader.pipeline[0].dataset.pipeline
    most, opening = math.inf, 1
    if isinstance(stages[0], ResampledShards2):  # which are drawn without end
        most = _ROUNDS * len(stages[0].urls) + _BUFFER + args.batch_size
    else:
        opening = stages.index(wds.split_by_worker) + 1
    watched = _Pass(args.batch_size, most)
    stages.insert(opening, watched.shards)
    stages.append(watched.batches)


class _Pass:
    """Two stages around one process's pass over its shards."""

    def __init__(self, batch_size: int, most: float) -> None:
        """``most`` is how many shards are opened for a first batch."""
        self.batch_size, self.most = batch_size, most
        self.opened: list[str] = []
        self.made = 0

    def shards(self, source: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Before the shards are opened."""
        self.opened, self.made = [], 0
        for shard in source:
            if not self.made:
                if len(self.opened) > self.most:
                    self._give_up()
                self.opened.append(shard["url"])
            yield shard

    def batches(self, source: Iterator[Any]) -> Iterator[Any]:
        """After batches are made."""
        for batch in source:
            self.made += 1
            yield batch
        if not self.made:
            self._give_up()

    def _give_up(self) -> NoReturn:
        info = get_worker_info()
        process = f" in loader process {info.id} of {info.num_workers}" if info else ""
        shards = sorted(set(self.opened))
        raise NoBatchError(
            f"--train-data gives no batch of {self.batch_size}{process} from {len(shards)} shards "
            f"({', '.join(shards[:_NAMED]) or 'none'}); otter-openclip data inspect says what is in "
            "them, a lower --batch-size or --workers needs less"
        )


def check_model(what: str, model: nn.Module) -> None:
    """End the run, naming the first of ``model``'s tensors in which there is a NaN or an infinity.

    -inf is allowed but in parameters: it masks attention.
    """
    finite = {name: param.isfinite().all() for name, param in model.named_parameters()}
    finite |= {
        name: (buffer < torch.inf).all()
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point()
    }
    if finite and not torch.stack([*finite.values()]).all():
        name = next(name for name, fine in finite.items() if not fine)
        stop(f"{name} of the {what} is not finite after the epoch")


def stop(reason: str) -> NoReturn:
    """End the run, in which something is not finite."""
    raise SystemExit(f"error: {reason}; {_HOW_TO_GO_ON}")
