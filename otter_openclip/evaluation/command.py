"""``otter-openclip eval``: ``clip_benchmark eval`` that also evaluates thousands of classes.

``clip_benchmark.cli.main`` runs as it is, with these of its names replaced while it runs:

================================ ===================================================================
``argparse``                     also knows the flags below
``main_eval``                    under ``--distributed`` every rank takes part in multi-label runs
``run``                          slashes of a model's name stay out of the output's name
``load_clip``                    the reference's test crop, on request
``build_dataset``                knows the names ``goi`` and ``imagenet10k``, and ``--templates``
``zeroshot_classification``      multi-label webdatasets are evaluated by ``otter_openclip.zeroshot``
``open``                         results are written to a temporary name, then renamed, by rank 0 only
================================ ===================================================================

``float`` in its accuracy is replaced too: NumPy 2.4 and later refuse the one-element array it is given.

Everything else, single-label classification and retrieval too, is clip_benchmark's.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import copy
import functools
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import open_clip.model
import torch
import torch.distributed as dist
from clip_benchmark import cli
from clip_benchmark.datasets.builder import build_wds_dataset
from clip_benchmark.metrics import zeroshot_classification as stock_classification
from torch import Tensor, nn

from otter_openclip.flags import name_nearest
from otter_openclip.preprocessing import evaluation_transform
from otter_openclip.zeroshot.classifier import (
    cached_class_features,
    check_classnames,
    make_prompts,
    read_templates,
)
from otter_openclip.zeroshot.images import MultiLabelImages, encode_images, is_multilabel
from otter_openclip.zeroshot.metrics import KS, check_ks, multilabel_metrics

TEMPLATES_FILE = "zeroshot_classification_templates.txt"
NAMED_DATASETS = ("goi", "imagenet10k")
DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "otter_openclip"

# Taken before anything is replaced.
_stock_main_eval = cli.main_eval
_stock_run = cli.run
_stock_load_clip = cli.load_clip
_stock_build_dataset = cli.build_dataset


def main(argv: Sequence[str]) -> int:
    """Evaluate with clip_benchmark's flags and these; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    command = _Command()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["otter-openclip", "eval", *argv]))
        for name, replacement in (
            ("argparse", SimpleNamespace(ArgumentParser=_Parser)),
            ("main_eval", command.main_eval),
            ("run", command.run),
            ("load_clip", command.load_clip),
            ("build_dataset", command.build_dataset),
            ("zeroshot_classification", SimpleNamespace(evaluate=command.evaluate)),
        ):
            stack.enter_context(mock.patch.object(cli, name, replacement))
        stack.enter_context(mock.patch.object(cli, "open", command.open, create=True))
        stack.enter_context(mock.patch.object(stock_classification, "float", _float, create=True))
        try:
            cli.main()
        except (ValueError, OSError, RuntimeError, AssertionError) as error:
            print(f"otter-openclip eval: error: {error}", file=sys.stderr)
            return 2
        finally:
            if command.world_size > 1:
                dist.destroy_process_group()
    return 0


def _float(value: Any) -> float:
    """``float`` that also takes an array of shape (1,)."""
    return builtins.float(value.item() if hasattr(value, "item") else value)


def _k(text: str) -> int:
    try:
        return check_ks([int(text)])[0]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"K must be a whole number of at least 1, got {text!r}; e.g. --ks 1 2 5 10"
        ) from None


class _Parser(argparse.ArgumentParser):
    """clip_benchmark's parser with the plugin's flags, and errors that name the nearest flag."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        (subcommands,) = self._subparsers._group_actions
        self._eval = subcommands.choices["eval"]
        group = self._eval.add_argument_group("otter-openclip", "multi-label classification")
        group.add_argument(
            "--ks", type=_k, nargs="+", default=list(KS), help="K of F@K; default 1 2 5 10"
        )
        group.add_argument(
            "--templates",
            metavar="{simple,imagenet,FILE}",
            help="prompts: 'a photo of {}.', open_clip's 80 for ImageNet, or a file with one a line; "
            "default: the dataset's own",
        )
        group.add_argument(
            "--reference_crop",
            action="store_true",
            help="resize to 256/224 of the model's image size, then crop, as the reference does",
        )
        group.add_argument(
            "--load_truncated",
            action="store_true",
            help="use what is there of an incomplete image (grey elsewhere) instead of stopping",
        )
        group.add_argument(
            "--class_cache",
            default=str(DEFAULT_CACHE),
            metavar="DIR",
            help="where class features are kept, '' for nowhere; default %(default)s",
        )
        parsed = super().parse_args(args, namespace)
        if parsed.templates and parsed.custom_template_file:
            self._eval.error("--templates and --custom_template_file exclude each other; drop one")
        return parsed

    def error(self, message: str) -> Any:
        parser = getattr(self, "_eval", self)
        message = name_nearest(message, parser._option_string_actions)
        self.exit(2, f"{parser.prog}: error: {message}\nSee {parser.prog} --help for all flags.\n")


class _Names(list):
    """A list that clip_benchmark does not print in full: it may be 20,000 names long."""

    def __repr__(self) -> str:
        if len(self) <= 10:
            return super().__repr__()
        return f"[{', '.join(map(repr, self[:5]))}, ... {len(self)} in all]"


class _Command:
    """One run of the command: what its replaced functions must know of each other."""

    def __init__(self) -> None:
        self.args: argparse.Namespace | None = None
        self.rank, self.world_size = 0, 1
        self.together = False  # whether all ranks work on the same runs

    def main_eval(self, base: argparse.Namespace) -> None:
        self.args = base
        self.templates = read_templates(base.templates) if base.templates else None
        if "{" not in (folder := os.path.dirname(base.output)) and folder:
            os.makedirs(folder, exist_ok=True)
        if base.distributed:
            local_rank, self.rank, world_size = cli.world_info_from_env()
            if world_size > 1:
                self._join(local_rank, world_size)
        if self.world_size == 1:
            return _stock_main_eval(base)
        # clip_benchmark deals whole runs out to ranks; multi-label ones are worked on by all.
        names = _expand(base.dataset)
        shared = [name for name in names if self._is_shared(name)]
        others = [name for name in names if name not in shared]
        for datasets, together in ((others, False), (shared, True)):
            if datasets:
                part = copy.copy(base)
                part.dataset, part.distributed, self.together = datasets, not together, together
                _stock_main_eval(part)
        dist.barrier()

    def _join(self, local_rank: int, world_size: int) -> None:
        if "MASTER_ADDR" not in os.environ:
            raise ValueError(
                f"--distributed with {world_size} processes needs MASTER_ADDR and MASTER_PORT; launch "
                "with torchrun, or set them"
            )
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        dist.init_process_group(
            "gloo", rank=self.rank, world_size=world_size, timeout=timedelta(days=1)
        )
        self.world_size = world_size

    def _is_shared(self, name: str) -> bool:
        if self.args.task not in ("auto", "zeroshot_classification"):
            return False
        if name in NAMED_DATASETS:
            return True
        if not name.startswith("wds/"):
            return False
        short = name.removeprefix("wds/")
        root = self.args.dataset_root.format(dataset=short, dataset_cleaned=short.replace("/", "-"))
        _check_root(root, self.args.split)
        return is_multilabel(build_wds_dataset(short, None, self.args.split, root))

    def run(self, args: argparse.Namespace) -> Any:
        args.output = args.output.replace("{model}", args.model.replace("/", "_"))
        if self.together and self.rank > 0:
            args.verbose = False
        return _stock_run(args)

    def load_clip(self, **kwargs: Any) -> tuple[Any, ...]:
        model, transform, tokenizer = _stock_load_clip(**kwargs)
        if self.args.reference_crop:
            transform = _reference_crop(model)
        return model, transform, tokenizer

    def build_dataset(self, **kwargs: Any) -> Any:
        name, split = kwargs["dataset_name"], kwargs.get("split", "test")
        if name in NAMED_DATASETS:
            kwargs |= {
                "dataset_name": f"wds/{name}",
                "root": _named_root(name, kwargs["root"], split),
            }
        if kwargs["dataset_name"].startswith("wds/"):
            _check_root(kwargs["root"], split)
        dataset = self._build(kwargs)
        if kwargs.get("task") != "zeroshot_classification":
            return dataset
        if is_multilabel(dataset):
            dataset.classes = _Names(dataset.classes)
            if isinstance(dataset.templates, list):
                dataset.templates = _Names(dataset.templates)
            dataset.multilabel = MultiLabelImages(
                dataset,
                kwargs["transform"],
                len(dataset.classes),
                load_truncated=self.args.load_truncated,
            )
        return dataset

    def _build(self, arguments: dict[str, Any]) -> Any:
        """clip_benchmark's dataset; ``--templates`` as the file in which it takes prompts."""
        with contextlib.ExitStack() as stack:
            if self.templates is not None:
                file = stack.enter_context(
                    tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8")
                )
                # Of any dataset: the key that clip_benchmark falls back on.
                json.dump({"imagenet1k": self.templates}, file)
                file.flush()
                arguments = arguments | {"custom_template_file": file.name}
            try:
                return _stock_build_dataset(**arguments)
            except AssertionError as error:
                root = Path(arguments["root"])
                if str(error).startswith("Classes not specified"):
                    raise ValueError(
                        f"{error}: {root / 'classnames.txt'} is missing; write it with one class a "
                        "line, or pass --custom_classname_file"
                    ) from None
                if str(error).startswith("Templates not specified"):
                    raise ValueError(
                        f"{error}: {root / TEMPLATES_FILE} is missing; pass --templates, e.g. "
                        "--templates simple"
                    ) from None
                raise

    def evaluate(
        self,
        model: nn.Module,
        dataloader: Any,
        tokenizer: Any,
        classnames: Sequence[str],
        templates: Any,
        device: str,
        **options: Any,
    ) -> dict[str, float]:
        images = getattr(dataloader.dataset, "multilabel", None)
        if images is None:
            return stock_classification.evaluate(
                model, dataloader, tokenizer, classnames, templates, device, **options
            )
        check_classnames(classnames, "class names")
        try:
            prompts = make_prompts(classnames, templates)
        except ValueError as error:
            raise ValueError(
                f"{error}; correct {self.args.custom_template_file or TEMPLATES_FILE}, or pass "
                "--templates"
            ) from None
        images.check()
        kind, amp = torch.device(device).type, options["amp"]
        if kind == "cpu" and amp and self.rank == 0:
            logging.warning(
                "clip_benchmark's mixed precision is bfloat16 on a CPU; --no_amp is more exact there"
            )
        autocast = functools.partial(torch.autocast, kind, enabled=amp)
        classes = None
        if self.rank == 0 or not self.together:
            classes = self._classes(
                model, tokenizer, prompts, torch.device(device), autocast, options
            )
        encoded = encode_images(
            model,
            images,
            device=device,
            autocast=autocast,
            batch_size=self.args.batch_size,
            workers=self.args.num_workers,
            rank=self.rank if self.together else 0,
            world_size=self.world_size if self.together else 1,
            progress=self.rank == 0,
        )
        metrics = None
        if encoded is not None:
            _warn_about_metrics(encoded.labels, self.args.ks, len(classnames))
            with autocast():
                metrics = multilabel_metrics(
                    encoded.features.to(device),
                    classes,
                    encoded.labels,
                    self.args.ks,
                    progress=True,
                )
        if self.together:
            box = [metrics]
            dist.broadcast_object_list(box)
            (metrics,) = box
        if self.rank == 0:
            print(", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return metrics

    def _classes(
        self,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Sequence[str]],
        device: torch.device,
        autocast: Any,
        options: dict[str, Any],
    ) -> Tensor:
        """(C, D) features, or the mean of those in ``--load_clfs``, (D, C) each."""
        if options["load_clfs"]:
            loaded = [torch.load(path, map_location="cpu") for path in options["load_clfs"]]
            for path, classifier in zip(options["load_clfs"], loaded, strict=True):
                if classifier.shape[-1] != len(prompts):
                    raise ValueError(
                        f"--load_clfs {path} has {classifier.shape[-1]} classes, the dataset "
                        f"{len(prompts)}"
                    )
            features = sum(classifier / len(loaded) for classifier in loaded).T.to(device)
        else:
            folder = self.args.class_cache
            features = cached_class_features(
                model,
                tokenizer,
                prompts,
                device=device,
                autocast=autocast,
                folder=Path(folder).expanduser() if folder else None,
                progress=True,
            )
        if options["save_clf"] is not None:
            temporary = f"{options['save_clf']}.tmp"
            torch.save(features.T.contiguous(), temporary)
            os.replace(temporary, options["save_clf"])
        return features

    @contextlib.contextmanager
    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Iterator[Any]:
        if "w" not in mode:
            with builtins.open(path, mode, *args, **kwargs) as file:
                yield file
        elif self.together and self.rank > 0:
            yield io.StringIO()
        else:
            temporary = f"{path}.tmp"
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with builtins.open(temporary, mode, *args, **kwargs) as file:
                yield file
            os.replace(temporary, path)


def _expand(names: Any) -> list[str]:
    """Dataset names, with clip_benchmark's collections and files of names replaced by their contents."""
    expanded = []
    for name in cli._as_list(names):
        if os.path.isfile(name):
            expanded += cli.get_dataset_collection_from_file(name)
        else:
            expanded += cli.dataset_collection.get(name, [name])
    return expanded


def _named_root(name: str, root: str, split: str) -> str:
    """The webdataset of ``name``: ``root`` itself, or the folder of that name in it."""
    if "://" in root:
        return root
    candidates = [Path(root), Path(root) / name]
    for folder in candidates:
        if (folder / split / "nshards.txt").is_file():
            return str(folder)
    raise ValueError(
        f"no webdataset of {name}: neither {candidates[0] / split / 'nshards.txt'} nor "
        f"{candidates[1] / split / 'nshards.txt'} exists; give its folder, or the one it is in, with "
        "--dataset_root"
    )


def _check_root(root: str, split: str) -> None:
    count = Path(root) / split / "nshards.txt"
    if "://" not in root and not count.is_file():
        raise ValueError(
            f"{root} is no clip_benchmark webdataset: {count} is missing; correct --dataset_root (it "
            "may contain {dataset}) or --split"
        )


def _reference_crop(model: nn.Module) -> Any:
    config = open_clip.model.get_model_preprocess_cfg(model)
    size = config.get("size", 224)
    if not isinstance(size, int):
        if len(set(size)) > 1:
            raise ValueError(f"--reference_crop crops squares, the model's image size is {size}")
        size = size[0]
    known = {key: config[key] for key in ("mean", "std") if key in config}
    return evaluation_transform(size, **known)


def _warn_about_metrics(labels: Sequence[Any], ks: Sequence[int], classes: int) -> None:
    without = sum(len(label) == 0 for label in labels)
    if without:
        logging.warning(
            f"{without} of {len(labels)} images have no true label; each counts as a miss in F@K"
        )
    large = [k for k in ks if k > classes]
    if large:
        logging.warning(
            f"--ks {' '.join(map(str, large))}: more than the {classes} classes, so every image with a "
            "label is a hit"
        )
