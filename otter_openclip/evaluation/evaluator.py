"""``otter-openclip eval``: ``clip_benchmark eval`` that also evaluates thousands of classes.

``clip_benchmark.cli.main`` runs as it is, with these names replaced while it runs:

==================================== ================================================================
``ArgumentParser.parse_args``        while the line is parsed: also knows the flags of ``run.py``
``ArgumentParser.error``             likewise: names the flag nearest to an unknown one
``cli.get_parser_args``              so that the two above end with the parsing
``cli.main_eval``                    ``--templates``; meets the other processes of ``--distributed``
``cli.run``                          slashes of a model's name stay out of the output's name; under
                                     ``--distributed`` every rank takes part in multi-label runs
``cli.load_clip``                    before it, the data set and a file of weights are checked; the
                                     model's transform is kept for multi-label runs
``cli.build_dataset``                knows ``goi`` and ``imagenet10k``; says which text file is missing
``zeroshot_classification.evaluate`` multi-label webdatasets are evaluated by ``run.py``
``zeroshot_classification.float``    NumPy 2.4 and later refuse the one-element array it is given
``cli.open``                         results are written whole or not at all, by rank 0 only
``plugins.find_entry_points``        of a patched clip_benchmark: it would find the same names again
``sys.argv``                         where clip_benchmark reads its line
==================================== ================================================================

and those of ``untrusted``. Everything else, single-label classification and retrieval too, is
clip_benchmark's.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import io
import itertools
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from clip_benchmark import cli
from clip_benchmark.datasets.builder import build_wds_dataset
from clip_benchmark.metrics import zeroshot_classification as stock_classification
from torch import nn

from otter_openclip.checkpoints.newest import read_checkpoint
from otter_openclip.cli import as_list, check_repeated, name_nearest, name_of, number
from otter_openclip.evaluation import run
from otter_openclip.evaluation.labelled_images import is_multilabel
from otter_openclip.evaluation.prompts import (
    TEMPLATES_FILE,
    check_classnames,
    check_json,
    check_prompts,
)
from otter_openclip.evaluation.validator import check_webdataset
from otter_openclip.files import written_whole
from otter_openclip.replacing import replaced
from otter_openclip.terminating import on_sigterm
from otter_openclip.untrusted import no_code_from_files

PACKAGE = "otter-openclip"

# Taken before anything is replaced.
_stock_parse_args = argparse.ArgumentParser.parse_args
_stock_get_parser_args = cli.get_parser_args
_stock_main_eval = cli.main_eval
_stock_run = cli.run
_stock_load_clip = cli.load_clip
_stock_build_dataset = cli.build_dataset
_stock_evaluate = stock_classification.evaluate


def main(argv: Sequence[str]) -> int:
    """Evaluate with clip_benchmark's flags and those of ``run.py``; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    command = _Command()
    replacements = [
        (sys, "argv", ["otter-openclip", "eval", *argv]),
        (cli, "get_parser_args", _get_parser_args),
        (cli, "main_eval", command.main_eval),
        (cli, "run", command.run),
        (cli, "load_clip", command.load_clip),
        (cli, "build_dataset", command.build_dataset),
        (cli, "open", command.open),
        (stock_classification, "evaluate", command.evaluate),
        (stock_classification, "float", _float),
    ]
    if hasattr(cli, "plugins"):
        others = functools.partial(_others, cli.plugins.find_entry_points)
        replacements.append((cli.plugins, "find_entry_points", others))
    try:
        with on_sigterm(), no_code_from_files(), replaced(*replacements):
            cli.main()
    except pickle.UnpicklingError as error:
        reason = (str(error).splitlines() or [""])[0]
        print(f"otter-openclip eval: error: weights cannot be read: {reason}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        print(f"otter-openclip eval: error: {error}", file=sys.stderr)
        return 2
    finally:
        if command.world_size > 1:
            dist.destroy_process_group()
    return 0


def _get_parser_args() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser
    with replaced((parser, "parse_args", _parse_args), (parser, "error", _error)):
        return _stock_get_parser_args()


def _parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    command = _eval_parser(parser)
    run.add_arguments(command)
    for flag, kind in _TYPES.items():
        command._option_string_actions[flag].type = kind
    check_repeated(command, sys.argv[1:])
    args = _stock_parse_args(parser)
    for action in command._actions:
        empty = "" in as_list(getattr(args, action.dest, None)) and action.default != ""
        if empty and action.dest not in ("class_cache", "pretrained"):  # local-dir: has no tag
            command.error(f"argument {name_of(action)}: expected a value, got ''")
    return args


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
    return text.lower() == "true"  # bool("False") is true


# Of clip_benchmark's own flags, which it takes as any number.
_TYPES = {
    "--batch_size": number(1, kind=int),
    "--num_workers": number(0, kind=int),
    "--recall_k": number(1, kind=int),
    "--fewshot_k": number(-1, kind=int),
    "--fewshot_epochs": number(1, kind=int),
    "--fewshot_lr": number(0, open_low=True),
    "--val_proportion": number(0, 1, open_low=True),
    "--seed": number(0, kind=int),
    "--normalize": _truth,
}


def _error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    parser = _eval_parser(parser)
    message = name_nearest(message, parser._option_string_actions)
    parser.exit(2, f"{parser.prog}: error: {message}\nSee {parser.prog} --help for all flags.\n")


def _eval_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    return parser._subparsers._group_actions[0].choices["eval"] if parser._subparsers else parser


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


def check_weights(pretrained: str) -> None:
    """Raise ValueError if ``pretrained`` is a damaged file, which torch reads as if it were whole."""
    path = Path(pretrained)
    if path.is_file() and path.suffix not in (
        ".npz",
        ".npy",
    ):  # big_vision's, which open_clip reads
        read_checkpoint(path)


class _Command:
    """One run of the command: what its replaced functions must know of each other."""

    def __init__(self) -> None:
        self.args: argparse.Namespace | None = None
        self.transform: Any = None
        self.rank, self.world_size = 0, 1
        self.checked: set[tuple[Any, ...]] = set()  # folders, and what was asked of them
        self.together = False  # whether all ranks work on the present run
        self.turns: Iterator[int] = itertools.cycle([0])  # the ranks that have the other runs

    def main_eval(self, base: argparse.Namespace) -> None:
        self.args = base
        if "{" not in (folder := os.path.dirname(base.output)) and folder:
            os.makedirs(folder, exist_ok=True)
        if base.distributed:
            # clip_benchmark deals whole runs out to ranks; here each rank sees all of them, see ``run``.
            self.rank, self.world_size = run.join_ranks()
            self.turns = itertools.cycle(range(self.world_size))
            base.distributed = False
        with run.templates_given(base):
            _stock_main_eval(base)
        if self.world_size > 1:
            dist.barrier()

    def run(self, args: argparse.Namespace) -> Any:
        self.args = args
        args.output = args.output.replace("{model}", args.model.replace("/", "_"))
        if self.world_size > 1:
            self.together = self._is_multilabel(args)
            if self.together:
                args.verbose = args.verbose and self.rank == 0
            elif next(self.turns) != self.rank:
                return None
        return _stock_run(args)

    def _is_multilabel(self, args: argparse.Namespace) -> bool:
        if args.task not in ("auto", "zeroshot_classification"):
            return False
        if not args.dataset.startswith("wds/"):
            return args.dataset in run.NAMED_DATASETS
        dataset = build_wds_dataset("evaluated", None, args.split, self._root(args))
        return is_multilabel(dataset)

    def _root(self, args: argparse.Namespace) -> str:
        name = args.dataset.removeprefix("wds/")
        return args.dataset_root.format(dataset=name, dataset_cleaned=name.replace("/", "-"))

    def load_clip(self, **kwargs: Any) -> tuple[Any, ...]:
        args = self.args
        task = args.task
        if task == "auto":
            task = cli.get_dataset_default_task(args.dataset.removeprefix("wds/"))
        own = args.custom_classname_file, args.custom_template_file
        self._check(args.dataset, self._root(args), args.split, task, *own)
        check_weights(kwargs["pretrained"])
        model, self.transform, tokenizer = _stock_load_clip(**kwargs)
        if self.args.reference_crop:
            self.transform = run.reference_crop(model)
        return model, self.transform, tokenizer

    def _check(
        self, name: str, root: str, split: str, task: str, names: str | None, templates: str | None
    ) -> str:
        """The folder of the data set ``name``; ValueError if it is a local webdataset with a fault."""
        check_json("--custom_classname_file", names)
        check_json("--custom_template_file", templates)
        if name in run.NAMED_DATASETS:
            root = run.named_root(name, root, split)
        elif not name.startswith("wds/"):
            return root
        needed = task in ("zeroshot_classification", "linear_probe")
        asked = root, split, needed, names, templates
        if asked in self.checked:
            return root
        self.checked.add(asked)
        check_webdataset(
            root,
            split,
            names=needed and not names,
            templates=needed and not templates,
            kinds=("npy", "cls") if needed else ("npy", "cls", "txt"),
            samples=self.rank == 0 or not self.together,
            progress=self.rank == 0,
            may_be_cut=self.args.load_truncated,
        )
        return root

    def build_dataset(self, **given: Any) -> Any:
        name, task = given["dataset_name"], given.get("task", "zeroshot_classification")
        custom = given.get("custom_template_file")
        names, file = given.get("custom_classname_file"), custom
        split = given.get("split", "test")
        given["root"] = self._check(name, given["root"], split, task, names, custom)
        if name in run.NAMED_DATASETS:
            given["dataset_name"] = f"wds/{name}"
        dataset = _stock_build_dataset(**given)
        multilabel = is_multilabel(dataset)
        if given["dataset_name"].startswith("wds/"):
            file = custom or f"{given['root']}/{TEMPLATES_FILE}"
        if task == "zeroshot_classification":
            if names and not multilabel:
                check_classnames(dataset.classes, names)
            if file:
                dataset.templates = check_prompts(dataset.templates, dataset.classes, file)
        return run.printed_shortened(dataset) if multilabel else dataset

    def evaluate(
        self, model: nn.Module, dataloader: Any, tokenizer: Any, *names: Any, **options: Any
    ) -> dict[str, float]:
        if not is_multilabel(dataloader.dataset):
            return _stock_evaluate(model, dataloader, tokenizer, *names, **options)
        given = model, dataloader.dataset, self.transform, tokenizer, self.args
        return run.evaluate(*given, together=self.together)

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" not in mode:
            return builtins.open(path, mode, *args, **kwargs)
        if self.together and self.rank > 0:
            return io.StringIO()
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        return written_whole(path, mode)
