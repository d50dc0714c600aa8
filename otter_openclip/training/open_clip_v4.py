"""The seam with open_clip_train 4.x; ``seam`` has what it shares with that of 3.x.

``open_clip_train.main.main`` runs as it is, with these of its names replaced while it runs:

=========================== ===========================================================================
``parse_args``              also knows the plugin's flags
``create_model_and_...``    also the fixed teacher of ``--distill-model`` and ``--reference-crop``
``create_task``             an ``OtterTask`` with the loss of ``--loss``
``create_optimizer``        learns s_d too, moves the EMA teacher, has the plugin's entry in its state
``get_data``                every epoch's data order follows from (seed, epoch, rank, worker)
``train_one_epoch``         the stock loop, on random numbers of its epoch, clipping s_d with the others
``zero_shot_eval``          also evaluates ``--zeroshot-data`` and keeps ``best.pt``
``prepare_distributed``     without ``device_ids`` for CPU modules, which torch refuses
``torch.save``              to a temporary name, then renamed: a killed run leaves no torn checkpoint
=========================== ===========================================================================

With ``--loss clip`` only the first, ``--reference-crop``, ``--zeroshot-data`` and the DDP fix apply. A
checkpoint is open_clip's own, with the EMA teacher as its ``state_dict_ema``; the plugin adds one key,
``checkpoint["optimizer"]["otter"]``, that stock open_clip ignores.
"""

from __future__ import annotations

import contextlib
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import open_clip
import torch
from open_clip.task import TrainingTask, get_model_from_task, save_checkpoint
from open_clip_train import main as open_clip_main
from open_clip_train.train import TrainState
from torch import nn

from otter_openclip.training import checkpoint, repeatable
from otter_openclip.training.arguments import TEACHER_LOSSES
from otter_openclip.training.losses import create_loss
from otter_openclip.training.plugin import TrainingPlugin
from otter_openclip.training.seam import Replacement, Run, run_main
from otter_openclip.training.task import OtterTask, TeacherEma, prepare_distributed

__all__ = ["OtterTask", "TeacherEma", "main", "setup_optimizer"]

# Taken before anything is replaced.
_stock_train_one_epoch = open_clip_main.train_one_epoch
_stock_create_task = open_clip_main.create_task
_stock_create_optimizer = open_clip_main.create_optimizer


def main(argv: Sequence[str], prog: str = "otter-openclip train") -> int:
    """Train with open_clip_train's flags and the plugin's; returns the exit code.

    Raises:
        SystemExit: on bad flags or unsupported mixes, before any data are read.
    """
    return run_main(argv, _Run(_Plugin(prog)).replacements())


def setup_optimizer(
    task: OtterTask, optimizer: torch.optim.Optimizer, args: Namespace
) -> torch.optim.Optimizer:
    """Let ``optimizer``, the student's, learn s_d, move the EMA teacher, and save and load both.

    For use before ``open_clip.task.load_checkpoint``.

    Args:
        task: with its teacher.
        optimizer: made from ``task.trainable_module``.
        args: of a run: ``world_size``, ``accum_freq``, ``loss`` and the plugin's flags.
    """
    ema = task.trainable_module_ema
    scale = getattr(task.loss, "distill_logit_scale", None)
    if ema is not None:
        optimizer.register_step_post_hook(lambda *_: task.update_ema())
    if scale is not None:
        checkpoint.add_scale(optimizer, scale, args)

    def teacher_entry() -> dict[str, Any]:
        return {} if ema is None else {"teacher_state": ema.extra_state()}

    def load_teacher(entry: dict[str, Any]) -> None:
        if ema is not None and "teacher_state" in entry:
            ema.load_extra_state(entry["teacher_state"])

    checkpoint.add_entry(optimizer, args, scale, teacher_entry)
    checkpoint.load_entry(optimizer, args, scale, load_teacher)
    return optimizer


class _Plugin(TrainingPlugin):
    """The hooks that do not depend on open_clip_train's version, and what 4.x has of its own."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self.state: TrainState | None = None

    def parse_args(self, parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
        args = super().parse_args(parser, argv)
        _check_unsupported(parser, args)
        return args

    def start_training(self, state: TrainState) -> None:
        self.state = state
        self.training = (state.optimizer, state.scaler)

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

    def __init__(self, plugin: _Plugin) -> None:
        super().__init__(plugin)
        self.task: OtterTask | None = None

    def replacements(self) -> list[Replacement]:
        return [
            *super().replacements(),
            (open_clip_main, "create_task", self.create_task),
            (open_clip_main, "create_optimizer", self.create_optimizer),
            (open_clip_main, "train_one_epoch", self.train_one_epoch),
            (TrainingTask, "prepare_distributed", prepare_distributed),
        ]

    def create_task(self, args: Namespace, model: nn.Module, **kwargs: Any) -> TrainingTask:
        if self.plugin.stock:
            return _stock_create_task(args, model=model, **kwargs)
        teacher = self.plugin.fixed_teacher
        self.task = OtterTask(model, loss=create_loss(args), teacher=teacher)
        if args.loss in TEACHER_LOSSES and teacher is None:
            self.task.setup_ema(args.ema_decay, eval_mode=args.teacher_mode == "eval")
        return self.task

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = _stock_create_optimizer(*args, **kwargs)
        return optimizer if self.plugin.stock else setup_optimizer(self.task, optimizer, self.args)

    def train_one_epoch(
        self, state: TrainState, data: dict[str, Any], *rest: Any, **kw: Any
    ) -> None:
        first = self.plugin.state is None
        self.plugin.start_training(state)
        if self.plugin.stock:
            return _stock_train_one_epoch(state, data, *rest, **kw)
        args, task = self.args, self.task
        if first:
            self.plugin.log_teacher(args, task.trainable_module_ema)
        repeatable.seed_process(args.seed, args.rank, state.epoch)
        with _clipped_too(getattr(task.loss, "distill_logit_scale", None)):
            _stock_train_one_epoch(state, data, *rest, **kw)

    def student(self, model: nn.Module) -> nn.Module:
        return get_model_from_task(model)


@contextlib.contextmanager
def _clipped_too(scale: nn.Parameter | None) -> Iterator[None]:
    """While active, gradient clipping, which open_clip's loop does by the student, has s_d as well."""
    stock = nn.utils.clip_grad_norm_
    more = [] if scale is None else [scale]

    def clip(parameters: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return stock([*parameters, *more], *args, **kwargs)

    with mock.patch.object(nn.utils, "clip_grad_norm_", clip):
        yield


def _check_unsupported(parser: ArgumentParser, args: Namespace) -> None:
    """What of 4.x's flags the plugin cannot do; the shared checks come before."""
    config = open_clip.get_model_config(args.model) if ":" not in args.model else None
    lower = args.model.lower()
    audio = "audio_cfg" in (config or {}) or (args.dataset_type or "").endswith("-audio")
    generative = "genlip" in lower or "genlap" in lower
    if args.loss == "clip":
        if args.zeroshot_data is not None and (args.fsdp or args.use_naflex or audio or generative):
            parser.error(
                "--zeroshot-data is for image-text models of fixed size that one process holds whole; "
                "drop it, or --fsdp, --use-naflex and the like"
            )
        if args.reference_crop and (args.use_naflex or audio or generative):
            parser.error("--reference-crop makes images of one size; drop it or --use-naflex")
        return
    name = f"--loss {args.loss}"
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
    if args.bucket_prefetch_pools > 0:
        parser.error(
            f"{name} does not go with --bucket-prefetch-pools: its thread draws random numbers beside "
            "the loader's, so that a resumed run would not go on as before; drop it"
        )
