"""The seam with open_clip_train 3.x as released.

``open_clip_train.main.main`` runs as it is, with these of its names replaced while it runs by functions
around the hooks of :class:`~otter_openclip.training.plugin.TrainingPlugin`:

=========================== ===========================================================================
``parse_args``              ``parse_args``
``create_model_and_...``    ``setup_model``
``pt_load``                 ``load_checkpoint``
optimizers' own loading     ``load_optimizer``
``get_data``                ``setup_data``
``create_loss``             ``create_loss``
``train_one_epoch``         ``wrap_model`` and ``setup_optimizer`` once; ``start_epoch``; the stock loop
``zero_shot_eval``          the stock one and ``evaluate``
``torch.save``              ``save_checkpoint``
``DistributedDataParallel`` without ``device_ids`` for CPU modules, which torch refuses
=========================== ===========================================================================

open_clip_train with ``patches/open_clip_torch-3.3.0.patch`` calls the same hooks itself.
"""

from __future__ import annotations

import argparse
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import open_clip
import torch
from open_clip_train import main as open_clip_main
from open_clip_train import params
from open_clip_train import train as open_clip_train_loop
from torch import Tensor, nn

from otter_openclip.replacing import replaced
from otter_openclip.terminating import on_sigterm
from otter_openclip.training.ending import loaders_ended
from otter_openclip.training.plugin import ZEROSHOT_DATA, TrainingPlugin
from otter_openclip.training.watch import reason_given
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
SUPPORTED = ((3, 2), (4, 0))
# Taken before anything is replaced.
_stock_train_one_epoch = open_clip_main.train_one_epoch
_stock_ddp = nn.parallel.DistributedDataParallel


def main(argv: Sequence[str], prog: str = "otter-openclip train") -> int:
    """Train with open_clip_train's flags and the plugin's; returns the exit code.

    Raises:
        SystemExit: on bad flags, unsupported mixes or an open_clip outside the supported range, all
            before any data are read.
    """
    check_open_clip_version(open_clip.__version__)
    plugin = TrainingPlugin(prog)
    load = lambda optimizer, state: plugin.load_optimizer(optimizer, state)  # noqa: E731
    replacements = [(torch.optim.Optimizer, "load_state_dict", load)]
    if hasattr(open_clip_main, "load_plugin"):  # the patched package asks for its plugin itself
        replacements.append((open_clip_main, "load_plugin", lambda _: plugin))
    else:
        replacements += _Run(plugin).replacements()
    return run_main(argv, plugin, replacements)


def check_open_clip_version(version: str) -> None:
    """Exit with the reason unless ``version`` of open_clip is one this seam was written for."""
    numbers = tuple(int(part) for part in version.split(".")[:2])
    low, high = SUPPORTED
    if not low <= numbers < high:
        raise SystemExit(
            f"otter-openclip supports open_clip_torch >={low[0]}.{low[1]},<{high[0]}, found {version}; "
            f'install a supported one: pip install "open_clip_torch>={low[0]}.{low[1]},<{high[0]}"'
        )


class _DistributedDataParallel(_stock_ddp):
    """DDP that drops ``device_ids`` for a module on the CPU."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
        if all(param.device.type == "cpu" for param in module.parameters()):
            device_ids = None
        super().__init__(module, device_ids=device_ids, **kwargs)


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


class _Run(Run):
    """What 3.x's ``main`` has of its own: a loss, a model that is trained, a checkpoint that is read."""

    def __init__(self, plugin: TrainingPlugin) -> None:
        super().__init__(plugin)
        self.train_model: nn.Module | None = None

    def replacements(self) -> list[Replacement]:
        return [
            *super().replacements(),
            (open_clip_main, "create_loss", self.plugin.create_loss),
            (open_clip_main, "pt_load", self.pt_load),
            (open_clip_main, "train_one_epoch", self.train_one_epoch),
            (nn.parallel, "DistributedDataParallel", _DistributedDataParallel),
        ]

    def pt_load(self, path: str, map_location: Any = None) -> Any:
        return self.plugin.load_checkpoint(path)

    def train_one_epoch(
        self,
        model: nn.Module,
        data: dict[str, Any],
        loss: Callable[..., dict[str, Tensor]],
        epoch: int,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        if self.train_model is None:
            self.train_model = self.plugin.wrap_model(self.args, model)
            self.plugin.setup_optimizer(self.args, optimizer, scaler)
        self.plugin.start_epoch(self.args, epoch)
        with reason_given():
            _stock_train_one_epoch(
                self.train_model, data, loss, epoch, optimizer, scaler, *rest, **kwargs
            )
        self.plugin.check_finite()
