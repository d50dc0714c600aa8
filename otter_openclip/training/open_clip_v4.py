"""The seam with open_clip_train 4.x; ``seam`` has what it shares with that of 3.x.

``open_clip_train.main.main`` runs as it is, with these of its names replaced while it runs:

=========================== ===========================================================================
``parse_args``              also knows the plugin's flags
``create_model_and_...``    also the fixed teacher of ``--distill-model`` and ``--reference-crop``
``create_task``             an ``OtterTask`` with the loss of ``--loss``
``create_optimizer``        a resumed state of another major version is refused with the fix
``pt_load``                 the plugin's part of a checkpoint is kept until training starts
``get_data``                every epoch's data order follows from (seed, epoch, rank, worker)
``train_one_epoch``         the stock loop, on random numbers of its epoch, clipping s_d with the
                            others; at first the optimizer also learns s_d and moves the EMA teacher
``zero_shot_eval``          also evaluates ``--zeroshot-data`` and keeps ``best.pt``
``prepare_distributed``     without ``device_ids`` for CPU modules, which torch refuses
``torch.save``              with the plugin's part, to a temporary name, then renamed
=========================== ===========================================================================

With ``--loss clip`` only the first, ``--reference-crop``, ``--zeroshot-data`` and the DDP fix apply. A
checkpoint is open_clip's own, with the EMA teacher as its ``state_dict_ema``; the plugin adds one key,
``otter``, that stock open_clip ignores.
"""

from __future__ import annotations

import contextlib
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from open_clip.task import TrainingTask, get_model_from_task, save_checkpoint
from open_clip_train import file_utils
from open_clip_train import main as open_clip_main
from open_clip_train.train import TrainState
from timm.utils import unwrap_model
from torch import nn

from otter_openclip.checkpoints.layout import ENTRY
from otter_openclip.features.prefix import find_prefixes
from otter_openclip.replacing import replaced
from otter_openclip.teacher import EmaTeacher
from otter_openclip.training.data_checks import reason_given
from otter_openclip.training.objectives import create_loss
from otter_openclip.training.plugin import TrainingPlugin
from otter_openclip.training.seam import Replacement, Run, run_main
from otter_openclip.training.task import OtterTask, prepare_distributed
from otter_openclip.training.train_flags import TEACHER_LOSSES, has_ema, model_config

__all__ = ["OtterTask", "main"]

# Taken before anything is replaced.
_stock_train_one_epoch = open_clip_main.train_one_epoch
_stock_create_task = open_clip_main.create_task
_stock_create_optimizer = open_clip_main.create_optimizer


def main(argv: Sequence[str], prog: str = "otter-openclip train") -> int:
    """Train with open_clip_train's flags and the plugin's; returns the exit code.

    Raises:
        SystemExit: on bad flags or unsupported mixes, before any data are read.
    """
    plugin = _Plugin(prog)
    return run_main(argv, plugin, _Run(plugin).replacements())


class _Plugin(TrainingPlugin):
    """The hooks that do not depend on open_clip_train's version, and what 4.x has of its own."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self.state: TrainState | None = None
        self.task: OtterTask | None = None

    def parse_args(self, parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
        args = super().parse_args(parser, argv)
        _check_unsupported(parser, args)
        return args

    def fitted(self, loaded: Any) -> Any:
        return loaded  # 4.x has other names, and its task and _check_groups look at them

    def make_task(self, args: Namespace, model: nn.Module) -> OtterTask:
        self._loss, self._student = create_loss(args), model
        self.task = OtterTask(model, loss=self._loss, teacher=self.fixed_teacher)
        prefixes = find_prefixes(unwrap_model(model)).values()
        self.task.frozen = [*self.frozen_modules(args, model), *prefixes]
        if args.loss in TEACHER_LOSSES and self.fixed_teacher is None:
            self.task.setup_ema(args.ema_decay, eval_mode=args.teacher_mode == "eval")
        return self.task

    def start_training(self, args: Namespace, state: TrainState) -> None:
        if self.state is None:
            if self.task is not None:
                self.ema = self.task.trainable_module_ema  # made anew for DDP
            elif has_ema(args):
                # Not the task's own, which open_clip would evaluate and export in the model's place.
                self._student, self._loss = state.task.trainable_module, state.task.loss
                self.ema = EmaTeacher(self._student, args.ema_decay, eval_mode=True)
            foreign = self._resumed is not None and not self._resumed[ENTRY]
            if self.task is not None and self.ema is not None and foreign:
                # Another run's EMA was loaded into it: the teacher starts as a copy of the student.
                self.ema.set(unwrap_model(self.task.trainable_module))
                self.ema.set_extra_state({"num_updates": 1, "masters": {}})
            self.setup_optimizer(args, state.optimizer, state.scaler)
        self.state = state

    def update_teacher(self) -> None:
        if self.task is None:
            super().update_teacher()
        else:
            self.task.update_ema()

    def make_checkpoint(self, args: Namespace, model: nn.Module, epoch: int) -> dict[str, Any]:
        state = self.state
        return save_checkpoint(
            state.task,
            state.optimizer,
            epoch=epoch,
            scaler=state.scaler,
            name=args.name,
            global_step=state.global_step,
            samples_seen=state.samples_seen,
        )


class _Run(Run):
    """What 4.x's ``main`` has of its own: a task, an optimizer made from it."""

    def replacements(self) -> list[Replacement]:
        return [
            *super().replacements(),
            (open_clip_main, "create_task", self.create_task),
            (open_clip_main, "create_optimizer", self.create_optimizer),
            (file_utils, "pt_load", self.pt_load),
            (open_clip_main, "train_one_epoch", self.train_one_epoch),
            (TrainingTask, "prepare_distributed", prepare_distributed),
        ]

    def create_task(self, args: Namespace, model: nn.Module, **kwargs: Any) -> TrainingTask:
        if self.plugin.stock:
            return _stock_create_task(args, model=model, **kwargs)
        return self.plugin.make_task(args, model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = _stock_create_optimizer(*args, **kwargs)
        if not self.plugin.stock:
            optimizer.register_load_state_dict_pre_hook(_check_groups)
        return optimizer

    def pt_load(self, path: str, map_location: Any = None) -> Any:
        return self.plugin.load_checkpoint(path)

    def train_one_epoch(
        self, state: TrainState, data: dict[str, Any], *rest: Any, **kw: Any
    ) -> None:
        self.plugin.start_training(self.args, state)
        self.plugin.start_epoch(self.args, state.epoch)
        with reason_given(), _clipped_too(None if self.plugin.stock else self.plugin.scale):
            _stock_train_one_epoch(state, data, *rest, **kw)
        self.plugin.check_finite()

    def student(self, model: nn.Module) -> nn.Module:
        return get_model_from_task(model)


def _check_groups(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    own, saved = (
        [len(group["params"]) for group in groups]
        for groups in (optimizer.param_groups, state["param_groups"])
    )
    if saved != own:
        raise ValueError(
            f"the checkpoint's optimizer has groups of {saved} parameters, this run's of {own}: it "
            "was written under another major version of open_clip or with other flags; "
            "start from its weights instead, with --pretrained in place of --resume"
        )


@contextlib.contextmanager
def _clipped_too(scale: nn.Parameter | None) -> Iterator[None]:
    """While active, gradient clipping, which open_clip's loop does by the student, has s_d as well."""
    stock = nn.utils.clip_grad_norm_

    def clip(parameters: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return stock([*parameters, scale], *args, **kwargs)

    with replaced(*([] if scale is None else [(nn.utils, "clip_grad_norm_", clip)])):
        yield


def _check_unsupported(parser: ArgumentParser, args: Namespace) -> None:
    """What of 4.x's flags the plugin cannot do; the shared checks come before."""
    config = model_config(args)
    lower = args.model.lower()
    audio = "audio_cfg" in config or (args.dataset_type or "").endswith("-audio")
    generative = "genlip" in lower or "genlap" in lower
    name = f"--loss {args.loss}" if args.loss != "clip" else "--ema-decay"
    if args.bucket_prefetch_pools > 0 and (args.loss != "clip" or has_ema(args)):
        parser.error(
            f"{name} does not go with --bucket-prefetch-pools: its thread draws random numbers beside "
            "the loader's, so that a resumed run would not go on as before; drop it"
        )
    if args.loss == "clip":
        if args.zeroshot_data is not None and (args.fsdp or args.use_naflex or audio or generative):
            parser.error(
                "--zeroshot-data is for image-text models of fixed size that one process holds whole; "
                "drop it, or --fsdp, --use-naflex and the like"
            )
        if has_ema(args) and (
            args.fsdp or (args.torchcompile_strategy == "step" and args.torchcompile)
        ):
            parser.error(
                "--ema-decay follows parameters that one process holds whole, after each step of the "
                "optimizer in eager mode; drop it, or --fsdp and --torchcompile-strategy step"
            )
        if args.reference_crop and (args.use_naflex or audio or generative):
            parser.error("--reference-crop makes images of one size; drop it or --use-naflex")
        return
    if generative:
        parser.error(
            f"{name} does not go with {args.model}: a generative model has no pairs of features to "
            "match; use a CLIP model, or --loss clip"
        )
    if audio:
        parser.error(
            f"{name} does not go with audio (--model {args.model}, --dataset-type {args.dataset_type}): "
            "the method is for images and texts; use --loss clip"
        )
    if args.use_naflex:
        parser.error(
            f"{name} does not go with --use-naflex: the transport problem would change its size from "
            "step to step, and a resumed run its data order; drop --use-naflex, or use --loss clip"
        )
    if args.fsdp:
        parser.error(
            f"{name} does not go with --fsdp: open_clip's EMA, the teacher, cannot follow sharded "
            "parameters; drop --fsdp to train with DDP"
        )
    if args.torchcompile and args.torchcompile_strategy == "step":
        parser.error(
            f"{name} does not go with --torchcompile-strategy step: the teacher and the second scale "
            "move in hooks of the optimizer's step, which it compiles; use task or model"
        )
