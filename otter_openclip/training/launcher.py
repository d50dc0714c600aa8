"""open_clip_train's ``main`` as released, with the hooks of ``plugin`` in the places below.

============================== ========================================================================
``params.argparse``            ``parse_args``, by a parser of its own
``create_model_and_...``       ``setup_model``
``pt_load``                    ``load_checkpoint``
``get_data``                   ``setup_data``
``create_loss``                ``create_loss``
``train_one_epoch``            ``wrap_model``, ``setup_optimizer`` once; ``start_epoch``; the stock loop
``zero_shot_eval``             the stock one and ``evaluate``
``main.open``                  params.txt is UTF-8, whatever the locale
``main.torch``                 its ``save`` is ``save_checkpoint``; its ``DistributedDataParallel`` drops
                               ``device_ids`` for CPU modules, which torch refuses
============================== ========================================================================

All are names in open_clip_train's own modules; what is replaced process-wide is in ``untrusted``.
open_clip_train with ``patches/open_clip_torch-3.3.0.patch`` calls the hooks itself.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from open_clip_train import main as open_clip_main
from open_clip_train import params
from open_clip_train import train as open_clip_train_loop
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from otter_openclip.cli import USER_ERRORS
from otter_openclip.replacing import replaced
from otter_openclip.terminating import on_sigterm
from otter_openclip.training.plugin import ZEROSHOT_DATA, Plugin
from otter_openclip.training.watch import no_batch_in_one_line
from otter_openclip.untrusted import no_code_from_files

# With --zeroshot-data: an entry of get_data's dict that makes open_clip evaluate, without data.
_ZEROSHOT_KEY = "imagenet-v2"
_NO_DATA = object()

# Taken before anything is replaced.
_stock_create_model = open_clip_main.create_model_and_transforms
_stock_get_data = open_clip_main.get_data
_stock_train_one_epoch = open_clip_main.train_one_epoch
_stock_zero_shot_eval = open_clip_train_loop.zero_shot_eval


def main(
    argv: Sequence[str], prog: str = "otter-openclip train", plugin: Plugin | None = None
) -> int:
    """Train with open_clip_train's flags and the plugin's; returns the exit code.

    ``plugin`` is one whose hooks also do something for the caller.

    Raises:
        SystemExit: on bad flags and other bad input, with one line.
    """
    plugin = plugin or Plugin(prog)
    if hasattr(open_clip_main, "load_plugin"):  # the patched package asks for its plugin itself

        def load_plugin(_: Sequence[str]) -> Plugin:
            return plugin

        replacements = [(open_clip_main, "load_plugin", load_plugin)]
    else:
        replacements = Run(plugin).replacements()
    try:
        with (
            on_sigterm(),
            no_code_from_files(),
            replaced(*replacements),
            _folder_dropped_unless_trained(plugin),
        ):
            result = open_clip_main.main(list(argv))
    finally:
        if plugin.hooks is not None:
            plugin.close()
    return 1 if result == -1 else 0


@contextlib.contextmanager
def _folder_dropped_unless_trained(plugin: Plugin) -> Iterator[None]:
    """If the block fails before the first optimizer step, what the run wrote goes; --name is free."""
    stepped = False

    def note(*_: Any) -> None:
        nonlocal stepped
        stepped = True

    hook = register_optimizer_step_post_hook(note)
    try:
        yield
    except BaseException:
        if plugin.hooks is not None and not stepped:
            plugin.drop_folder()
        raise
    finally:
        hook.remove()


class _Overlay:
    """A module as one other module sees it: some names are given here, all others are its own."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """DDP that drops ``device_ids`` for a module on the CPU."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
        if all(param.device.type == "cpu" for param in module.parameters()):
            device_ids = None
        super().__init__(module, device_ids=device_ids, **kwargs)


class Run:
    """One call of ``main``: its names, as functions around the plugin's hooks."""

    def __init__(self, plugin: Plugin) -> None:
        self.plugin = plugin
        self._model_made = False
        self._train_model: nn.Module | None = None

    def replacements(self) -> list[tuple[Any, str, Any]]:
        """(module, name, replacement), as ``replacing.replaced`` takes them."""
        plugin = self.plugin  # its hooks are known once flags are parsed

        def load(path: str, map_location: Any = None) -> Any:
            return plugin.load_checkpoint(path)

        def save(checkpoint: Any, path: str) -> None:
            plugin.save_checkpoint(checkpoint, path)

        utf8 = {"encoding": "utf-8", "errors": "surrogateescape"}  # also for names given in ASCII
        parallel = _Overlay(nn.parallel, DistributedDataParallel=_DistributedDataParallel)
        overlay = _Overlay(torch, save=save, nn=_Overlay(nn, parallel=parallel))
        return [
            (params, "argparse", _Overlay(argparse, ArgumentParser=self.make_parser)),
            (open_clip_main, "create_model_and_transforms", self.create_model_and_transforms),
            (open_clip_main, "pt_load", load),
            (open_clip_main, "open", functools.partial(open, **utf8)),
            (open_clip_main, "get_data", self.get_data),
            (open_clip_main, "create_loss", lambda args: plugin.create_loss(args)),
            (open_clip_main, "train_one_epoch", self.train_one_epoch),
            (open_clip_train_loop, "zero_shot_eval", self.zero_shot_eval),
            (open_clip_main, "torch", overlay),
        ]

    def make_parser(self) -> ArgumentParser:
        """open_clip_train's parser, which the plugin parses with."""
        parser = ArgumentParser()
        parser.parse_args = functools.partial(self.plugin.parse_args, parser)
        return parser

    def create_model_and_transforms(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The first model is the student."""
        try:
            made = _stock_create_model(*args, **kwargs)
        # The first is of a flag that the tower does not take.
        except (TypeError, *USER_ERRORS) as error:
            self.plugin.refuse(f"--model {args[0]}: {error}", error)
        if self._model_made:  # the second is open_clip's own --distill-model
            return made
        self._model_made = True
        return self.plugin.setup_model(self.plugin.args, *made)

    def get_data(
        self, args: Namespace, preprocess_fns: tuple[Any, Any], *rest: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Stock data after the hook; with ``--zeroshot-data``, a reason to evaluate."""
        asked = f"--train-data {args.train_data}"
        asked += f" or --val-data {args.val_data}" if args.val_data else ""
        try:
            data = _stock_get_data(args, preprocess_fns, *rest, **kwargs)
        except KeyError as error:
            flags = "--csv-img-key, --csv-caption-key and --csv-separator"
            self.plugin.refuse(f"{asked} has no {error}; see {flags}", error)
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            self.plugin.refuse(f"{asked}: {error}", error)
        data = self.plugin.setup_data(args, data, preprocess_fns[1])
        if ZEROSHOT_DATA in data:
            # open_clip evaluates if one of its own sets is there.
            data.setdefault(_ZEROSHOT_KEY, _NO_DATA)
        return data

    def train_one_epoch(
        self,
        model: nn.Module,
        data: dict[str, Any],
        loss: Any,
        epoch: int,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        *others: Any,
        **keywords: Any,
    ) -> None:
        """The stock epoch, on the module that the plugin makes of ``model``."""
        plugin, args = self.plugin, self.plugin.args
        if self._train_model is None:
            self._train_model = plugin.wrap_model(args, model)
            plugin.setup_optimizer(args, optimizer, scaler)
        plugin.start_epoch(args, epoch)
        stock = (self._train_model, data, loss, epoch, optimizer, scaler, *others)
        with no_batch_in_one_line():
            _stock_train_one_epoch(*stock, **keywords)

    def zero_shot_eval(
        self,
        model: nn.Module,
        data: dict[str, Any],
        epoch: int,
        args: Namespace,
        tokenizer: Any = None,
    ) -> dict[str, float]:
        """Stock metrics of open_clip's own sets, then the plugin's."""
        stock = {name: value for name, value in data.items() if value is not _NO_DATA}
        metrics = _stock_zero_shot_eval(model, stock, epoch, args, tokenizer=tokenizer)
        return {**metrics, **self.plugin.evaluate(args, model, epoch, tokenizer)}
