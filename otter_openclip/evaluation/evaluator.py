"""``otter-openclip eval``: ``clip_benchmark eval`` that also evaluates thousands of classes.

``clip_benchmark.cli.main`` runs as it is, with these names replaced while it runs:

==================================== ================================================================
``ArgumentParser.parse_args``        while the line is parsed: also knows the flags of ``run.py``
``cli.get_parser_args``              so that the one above ends with the parsing
``cli.main_eval``                    ``--templates``; meets the other processes of ``--distributed``
``cli.run``                          slashes of a model's name stay out of the output's name; under
                                     ``--distributed`` every rank takes part in multi-label runs
``cli.load_clip``                    before it, a file of weights is checked; the model's transform is
                                     kept for multi-label runs
``cli.build_dataset``                knows ``goi`` and ``imagenet10k``; folders and samples are checked
``zeroshot_classification.evaluate`` multi-label webdatasets are evaluated by ``run.py``
``zeroshot_classification.float``    NumPy 2.4 and later refuse the one-element array it is given
``cli.open``                         results are written whole or not at all, by rank 0 only
``cli.json``                         results of classification say prompts and crop
``builder.open``                     text is read as UTF-8, whatever the locale
``plugins.find_entry_points``        of a patched clip_benchmark: finds none, ours are known here
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
import json
import logging
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from clip_benchmark import cli
from clip_benchmark.datasets import builder
from clip_benchmark.datasets.builder import build_wds_dataset
from clip_benchmark.metrics import zeroshot_classification as stock_classification
from torch import nn

from otter_openclip.checkpoints.newest import read_checkpoint
from otter_openclip.cli import USER_ERRORS
from otter_openclip.evaluation import run
from otter_openclip.evaluation.labelled_images import CheckedShards, is_multilabel, label_suffix
from otter_openclip.evaluation.prompts import TEMPLATES_FILE, check_prompts
from otter_openclip.evaluation.validator import check_webdataset
from otter_openclip.files import written_whole
from otter_openclip.replacing import replaced
from otter_openclip.terminating import on_sigterm
from otter_openclip.untrusted import no_code_from_files

BIG_VISION = (".npz", ".npy")  # weights that open_clip reads without torch

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
        (cli, "json", SimpleNamespace(load=json.load, dump=command.dump)),
        (builder, "open", functools.partial(open, encoding="utf-8")),
        (stock_classification, "evaluate", command.evaluate),
        (stock_classification, "float", _float),
    ]
    if hasattr(cli, "plugins"):
        replacements.append((cli.plugins, "find_entry_points", _no_entry_points))
    try:
        with on_sigterm(), no_code_from_files(), replaced(*replacements):
            cli.main()
    except pickle.UnpicklingError as error:
        reason = (str(error).splitlines() or [""])[0]
        print(f"otter-openclip eval: error: weights cannot be read: {reason}", file=sys.stderr)
        return 2
    except (AssertionError, *USER_ERRORS) as error:
        print(f"otter-openclip eval: error: {error}", file=sys.stderr)
        return 2
    finally:
        if command.world_size > 1:
            dist.destroy_process_group()
    return 0


def _get_parser_args() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    with replaced((argparse.ArgumentParser, "parse_args", _parse_args)):
        return _stock_get_parser_args()


def _parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    command = parser._subparsers._group_actions[0].choices["eval"]
    run.add_arguments(command)
    command._option_string_actions["--normalize"].type = _truth
    return _stock_parse_args(parser)


def _truth(text: str) -> bool:
    """The value of ``--normalize``, of which clip_benchmark takes ``False`` for true."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
    return text.lower() == "true"


def _no_entry_points(group: str) -> dict[str, Any]:
    return {}


def _float(value: Any) -> float:
    """``float`` that also takes an array of shape (1,)."""
    return builtins.float(value.item() if hasattr(value, "item") else value)


class _Command:
    """One run of the command: what its replaced functions must know of each other."""

    def __init__(self) -> None:
        self.args: argparse.Namespace | None = None
        self.transform: Any = None
        self.said: dict[str, Any] = {}  # how the present run makes its figures
        self.rank, self.world_size = 0, 1
        self.together = False  # whether all ranks work on the present run
        self.turns: Iterator[int] = itertools.cycle([0])  # the ranks that have the other runs

    def main_eval(self, base: argparse.Namespace) -> None:
        if "{" not in (folder := os.path.dirname(base.output)) and folder:
            os.makedirs(folder, exist_ok=True)  # or it would fail when all is computed
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
        name = args.dataset.removeprefix("wds/")
        root = args.dataset_root.format(dataset=name, dataset_cleaned=name.replace("/", "-"))
        return is_multilabel(build_wds_dataset("evaluated", None, args.split, root))

    def load_clip(self, **arguments: Any) -> tuple[Any, ...]:
        path = Path(arguments["pretrained"])
        if path.is_file() and path.suffix not in BIG_VISION:
            read_checkpoint(path)  # torch reads a damaged one as if it were whole
        model, self.transform, tokenizer = _stock_load_clip(**arguments)
        return model, self.transform, tokenizer

    def build_dataset(self, **arguments: Any) -> Any:
        name, root = arguments["dataset_name"], arguments["root"]
        task = arguments.get("task", "zeroshot_classification")
        names_file = arguments.get("custom_classname_file")
        templates_file = arguments.get("custom_template_file")
        if name in run.NAMED_DATASETS:
            arguments["root"] = root = run.named_root(name, root, arguments["split"])
            arguments["dataset_name"] = name = f"wds/{name}"
        if name.startswith("wds/"):
            if "://" not in root:
                labelled = task in ("zeroshot_classification", "linear_probe")
                check_webdataset(
                    root,
                    arguments["split"],
                    names=labelled and not names_file,
                    templates=labelled and not templates_file,
                )
            templates_file = templates_file or f"{root}/{TEMPLATES_FILE}"
        dataset, self.said = _stock_build_dataset(**arguments), {}
        if task == "zeroshot_classification" and templates_file:
            dataset.templates = check_prompts(dataset.templates, dataset.classes, templates_file)
        if task == "zeroshot_classification":
            self.said = run.how_measured(self.args, dataset)
        if label_suffix(dataset) in ("cls", "txt"):  # ours check what they read
            reader = CheckedShards(dataset)
            dataset.pipeline[reader.position] = reader
        return dataset

    def evaluate(
        self, model: nn.Module, dataloader: Any, tokenizer: Any, *names: Any, **options: Any
    ) -> dict[str, float]:
        dataset = dataloader.dataset
        if not is_multilabel(dataset):
            return _stock_evaluate(model, dataloader, tokenizer, *names, **options)
        return run.evaluate(
            model, dataset, self.transform, tokenizer, self.args, together=self.together
        )

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" not in mode:
            return builtins.open(path, mode, *args, **kwargs)
        if self.together and self.rank > 0:
            return io.StringIO()
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        return written_whole(path, mode)

    def dump(self, results: dict[str, Any], file: Any) -> None:
        json.dump(self.said | results, file)
