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
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch.distributed as dist
from clip_benchmark import cli
from clip_benchmark.datasets.builder import build_wds_dataset
from clip_benchmark.metrics import zeroshot_classification as stock_classification
from torch import nn

from otter_openclip.evaluation import multilabel, ranks
from otter_openclip.evaluation.arguments import add_arguments, check_arguments
from otter_openclip.evaluation.datasets import (
    NAMED_DATASETS,
    check_root,
    classes_missing,
    named_root,
    shorten_names,
    templates_file,
    templates_missing,
)
from otter_openclip.flags import name_nearest
from otter_openclip.zeroshot.classifier import read_templates
from otter_openclip.zeroshot.images import MultiLabelImages, is_multilabel

PACKAGE = "otter-openclip"

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
        if hasattr(cli, "plugins"):
            # A patched clip_benchmark would find the same flags and names by the entry points too.
            others = functools.partial(_others, cli.plugins.find_entry_points)
            stack.enter_context(mock.patch.object(cli.plugins, "find_entry_points", others))
        try:
            cli.main()
        except (ValueError, OSError, RuntimeError, AssertionError) as error:
            print(f"otter-openclip eval: error: {error}", file=sys.stderr)
            return 2
        finally:
            if command.world_size > 1:
                dist.destroy_process_group()
    return 0


def _others(find: Callable[[str], dict[str, dict[str, Any]]], group: str) -> dict[str, Any]:
    """What packages other than this one provide: name -> package -> entry point."""
    found = {
        name: {package: point for package, point in packages.items() if package != PACKAGE}
        for name, packages in find(group).items()
    }
    return {name: packages for name, packages in found.items() if packages}


def _float(value: Any) -> float:
    """``float`` that also takes an array of shape (1,)."""
    return builtins.float(value.item() if hasattr(value, "item") else value)


class _Parser(argparse.ArgumentParser):
    """clip_benchmark's parser with the plugin's flags, and errors that name the nearest flag."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        (subcommands,) = self._subparsers._group_actions
        self._eval = subcommands.choices["eval"]
        add_arguments(self._eval)
        parsed = super().parse_args(args, namespace)
        try:
            check_arguments(parsed)
        except ValueError as error:
            self._eval.error(str(error))
        return parsed

    def error(self, message: str) -> Any:
        parser = getattr(self, "_eval", self)
        message = name_nearest(message, parser._option_string_actions)
        self.exit(2, f"{parser.prog}: error: {message}\nSee {parser.prog} --help for all flags.\n")


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
                ranks.join(local_rank, self.rank, world_size)
                self.world_size = world_size
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

    def _is_shared(self, name: str) -> bool:
        if self.args.task not in ("auto", "zeroshot_classification"):
            return False
        if name in NAMED_DATASETS:
            return True
        if not name.startswith("wds/"):
            return False
        short = name.removeprefix("wds/")
        root = self.args.dataset_root.format(dataset=short, dataset_cleaned=short.replace("/", "-"))
        check_root(root, self.args.split)
        return is_multilabel(build_wds_dataset(short, None, self.args.split, root))

    def run(self, args: argparse.Namespace) -> Any:
        args.output = args.output.replace("{model}", args.model.replace("/", "_"))
        if self.together and self.rank > 0:
            args.verbose = False
        return _stock_run(args)

    def load_clip(self, **kwargs: Any) -> tuple[Any, ...]:
        model, transform, tokenizer = _stock_load_clip(**kwargs)
        if self.args.reference_crop:
            transform = multilabel.reference_crop(model)
        return model, transform, tokenizer

    def build_dataset(self, **kwargs: Any) -> Any:
        name, split = kwargs["dataset_name"], kwargs.get("split", "test")
        if name in NAMED_DATASETS:
            kwargs |= {
                "dataset_name": f"wds/{name}",
                "root": named_root(name, kwargs["root"], split),
            }
        if kwargs["dataset_name"].startswith("wds/"):
            check_root(kwargs["root"], split)
        dataset = self._build(kwargs)
        if kwargs.get("task") != "zeroshot_classification":
            return dataset
        if is_multilabel(dataset):
            shorten_names(dataset)
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
                file = stack.enter_context(templates_file(self.templates))
                arguments = arguments | {"custom_template_file": file}
            try:
                return _stock_build_dataset(**arguments)
            except AssertionError as error:
                if str(error).startswith("Classes not specified"):
                    raise ValueError(f"{error}: {classes_missing(arguments['root'])}") from None
                if str(error).startswith("Templates not specified"):
                    raise ValueError(f"{error}: {templates_missing(arguments['root'])}") from None
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
        return multilabel.evaluate(
            model,
            images,
            tokenizer,
            classnames,
            templates,
            self.args,
            device=device,
            rank=self.rank if self.together else 0,
            world_size=self.world_size if self.together else 1,
        )

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
