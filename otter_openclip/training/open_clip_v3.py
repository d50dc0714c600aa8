"""The seam with open_clip_train 3.x as released: everything that knows its ``main`` is in this file.

``open_clip_train.main.main`` runs as it is, with these of its names replaced while it runs by functions
around the hooks of :class:`~otter_openclip.training.plugin.TrainingPlugin`:

=========================== ===========================================================================
``parse_args``              ``parse_args``
``create_model_and_...``    ``setup_model``
``pt_load``                 ``load_checkpoint``
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

import contextlib
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import open_clip
import torch
from open_clip_train import main as open_clip_main
from open_clip_train import params
from open_clip_train import train as open_clip_train_loop
from torch import Tensor, nn

from otter_openclip.training.arguments import parser_replaced
from otter_openclip.training.plugin import ZEROSHOT_DATA, TrainingPlugin

SUPPORTED = ((3, 2), (4, 0))
# With --zeroshot-data: an entry of get_data's dict that makes open_clip evaluate, without data.
_ZEROSHOT_KEY = "imagenet-v2"
_NO_DATA = object()

# Taken before anything is replaced.
_stock_train_one_epoch = open_clip_main.train_one_epoch
_stock_create_model = open_clip_main.create_model_and_transforms
_stock_get_data = open_clip_main.get_data
_stock_zero_shot_eval = open_clip_train_loop.zero_shot_eval
_stock_ddp = nn.parallel.DistributedDataParallel
_stock_save = torch.save


def main(argv: Sequence[str], prog: str = "otter-openclip train") -> int:
    """Train with open_clip_train's flags and the plugin's; returns the exit code.

    Raises:
        SystemExit: on bad flags, unsupported mixes or an open_clip outside the supported range, all
            before any data are read.
    """
    check_open_clip_version(open_clip.__version__)
    plugin = TrainingPlugin(prog)
    with contextlib.ExitStack() as stack:
        for target, name, replacement in _replacements(plugin):
            stack.enter_context(mock.patch.object(target, name, replacement))
        result = open_clip_main.main(list(argv))
    return 1 if result == -1 else 0


def _replacements(plugin: TrainingPlugin) -> list[tuple[Any, str, Any]]:
    if hasattr(open_clip_main, "load_plugin"):  # the patched package asks for its plugin itself
        return [(open_clip_main, "load_plugin", lambda _: plugin)]
    run = _Run(plugin)
    return [
        (open_clip_main, "parse_args", run.parse_args),
        (open_clip_main, "create_model_and_transforms", run.create_model_and_transforms),
        (open_clip_main, "create_loss", plugin.create_loss),
        (open_clip_main, "pt_load", run.pt_load),
        (open_clip_main, "get_data", run.get_data),
        (open_clip_main, "train_one_epoch", run.train_one_epoch),
        (open_clip_train_loop, "zero_shot_eval", run.zero_shot_eval),
        (nn.parallel, "DistributedDataParallel", _DistributedDataParallel),
        (torch, "save", run.save),
    ]


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


class _Run:
    """One call of open_clip's ``main``: its replaced functions, around the plugin's hooks."""

    def __init__(self, plugin: TrainingPlugin) -> None:
        self.plugin = plugin
        self.args: Namespace | None = None
        self.model_made = False
        self.train_model: nn.Module | None = None

    def parse_args(self, argv: Sequence[str]) -> Namespace:
        with parser_replaced(self.plugin.parse_args):
            self.args = params.parse_args(argv)
        return self.args

    def create_model_and_transforms(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        made = _stock_create_model(*args, **kwargs)
        if self.model_made:  # the second is open_clip's own --distill-model
            return made
        self.model_made = True
        return self.plugin.setup_model(self.args, *made)

    def pt_load(self, path: str, map_location: Any = None) -> Any:
        return self.plugin.load_checkpoint(path)

    def get_data(
        self, args: Namespace, preprocess_fns: tuple[Any, Any], *rest: Any, **kwargs: Any
    ) -> dict[str, Any]:
        data = _stock_get_data(args, preprocess_fns, *rest, **kwargs)
        data = self.plugin.setup_data(args, data, preprocess_fns[1])
        if ZEROSHOT_DATA in data:
            # open_clip evaluates if one of its own sets is there.
            data.setdefault(_ZEROSHOT_KEY, _NO_DATA)
        return data

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
        _stock_train_one_epoch(
            self.train_model, data, loss, epoch, optimizer, scaler, *rest, **kwargs
        )

    def zero_shot_eval(
        self,
        model: nn.Module,
        data: dict[str, Any],
        epoch: int,
        args: Namespace,
        tokenizer: Any = None,
    ) -> dict[str, float]:
        own = {name: value for name, value in data.items() if value is not _NO_DATA}
        metrics = _stock_zero_shot_eval(model, own, epoch, args, tokenizer=tokenizer)
        return {**metrics, **self.plugin.evaluate(args, model, epoch, tokenizer)}

    def save(self, obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if args or kwargs or not isinstance(f, str | os.PathLike):
            return _stock_save(obj, f, *args, **kwargs)
        self.plugin.save_checkpoint(obj, f)
