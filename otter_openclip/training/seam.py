"""Names of open_clip_train's ``main``, replaced while it runs: what 3.x and 4.x have in common."""

from __future__ import annotations

import argparse
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from open_clip_train import main as open_clip_main
from open_clip_train import params
from open_clip_train import train as open_clip_train_loop
from torch import nn

from otter_openclip.replacing import replaced
from otter_openclip.terminating import on_sigterm
from otter_openclip.training.ending import loaders_ended
from otter_openclip.training.plugin import ZEROSHOT_DATA, TrainingPlugin
from otter_openclip.untrusted import no_code_from_files

# With --zeroshot-data: an entry of get_data's dict that makes open_clip evaluate, without data.
_ZEROSHOT_KEY = "imagenet-v2"
_NO_DATA = object()

# Taken before anything is replaced.
_stock_parse_args = ArgumentParser.parse_args
_stock_create_model = open_clip_main.create_model_and_transforms
_stock_get_data = open_clip_main.get_data
_stock_zero_shot_eval = open_clip_train_loop.zero_shot_eval
_stock_save = torch.save

Replacement = tuple[Any, str, Any]


def run_main(
    argv: Sequence[str], plugin: TrainingPlugin, replacements: Iterable[Replacement]
) -> int:
    """Run ``main`` with every (module, name, replacement) in place; returns the exit code."""
    try:
        with on_sigterm(), no_code_from_files(), loaders_ended(), replaced(*replacements):
            with plugin.ending.explained():
                result = open_clip_main.main(list(argv))
    finally:
        plugin.let_go()
    return 1 if result == -1 else 0


class Run:
    """One call of ``main``: replaced functions around the plugin's hooks."""

    def __init__(self, plugin: TrainingPlugin) -> None:
        self.plugin = plugin
        self.args: Namespace | None = None
        self._model_made = False

    def replacements(self) -> list[Replacement]:
        """For :func:`run_main`."""
        return [
            (open_clip_main, "parse_args", self.parse_args),
            (open_clip_main, "create_model_and_transforms", self.create_model_and_transforms),
            (open_clip_main, "get_data", self.get_data),
            (open_clip_train_loop, "zero_shot_eval", self.zero_shot_eval),
            (torch, "save", self.save),
        ]

    def parse_args(self, argv: Sequence[str]) -> Namespace:
        """Stock, but the parser it makes is parsed by the plugin."""

        def parse(parser: ArgumentParser, args: Any = None, namespace: Any = None) -> Namespace:
            with replaced((argparse.ArgumentParser, "parse_args", _stock_parse_args)):
                return self.plugin.parse_args(parser, args)

        with replaced((argparse.ArgumentParser, "parse_args", parse)):
            self.args = params.parse_args(argv)
        return self.args

    def create_model_and_transforms(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The first model is the student."""
        made = _stock_create_model(*args, **kwargs)
        if self._model_made:  # the second is open_clip's own --distill-model
            return made
        self._model_made = True
        return self.plugin.setup_model(self.args, *made)

    def get_data(
        self, args: Namespace, preprocess_fns: tuple[Any, Any], *rest: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Repeatable training data; with ``--zeroshot-data``, a reason to evaluate."""
        data = _stock_get_data(args, preprocess_fns, *rest, **kwargs)
        data = self.plugin.setup_data(args, data, preprocess_fns[1])
        if ZEROSHOT_DATA in data:
            # open_clip evaluates if one of its own sets is there.
            data.setdefault(_ZEROSHOT_KEY, _NO_DATA)
        return data

    def zero_shot_eval(
        self,
        model: nn.Module,
        data: dict[str, Any],
        epoch: int,
        args: Namespace,
        tokenizer: Any = None,
    ) -> dict[str, float]:
        """Stock metrics of open_clip's own sets, then the plugin's."""
        own = {name: value for name, value in data.items() if value is not _NO_DATA}
        metrics = _stock_zero_shot_eval(model, own, epoch, args, tokenizer=tokenizer)
        return {**metrics, **self.plugin.evaluate(args, self.student(model), epoch, tokenizer)}

    def student(self, model: nn.Module) -> nn.Module:
        """The model in what open_clip evaluates."""
        return model

    def save(self, obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        """Checkpoints, which ``main`` writes by name, go to the plugin."""
        if args or kwargs or not isinstance(f, str | os.PathLike):
            return _stock_save(obj, f, *args, **kwargs)
        self.plugin.save_checkpoint(obj, f)
