"""The seam with open_clip_train 3.x as released; ``seam`` has what it shares with that of 4.x.

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

from collections.abc import Callable, Sequence
from typing import Any

import open_clip
import torch
from open_clip_train import main as open_clip_main
from torch import Tensor, nn

from otter_openclip.training.data_checks import reason_given
from otter_openclip.training.plugin import TrainingPlugin
from otter_openclip.training.seam import Replacement, Run, run_main

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
