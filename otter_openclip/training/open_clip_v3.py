"""The seam with open_clip_train 3.x: everything that knows its training loop is in this file.

``open_clip_train.main.main`` runs as it is, with these of its names replaced while it runs:

=========================== ===========================================================================
``parse_args``              also knows the plugin's flags
``create_model_and_...``    also the fixed teacher of ``--distill-model`` and ``--reference-crop``
``create_loss``             the loss that ``--loss`` names
``pt_load``                 keeps the checkpoint's ``otter`` entry for ``train_one_epoch``
``get_data``                every epoch's data order follows from (seed, epoch, rank, worker)
``train_one_epoch``         the stock loop, given the student with its teacher beside it
``zero_shot_eval``          also evaluates ``--zeroshot-data`` and keeps ``best.pt``
``DistributedDataParallel`` without ``device_ids`` for CPU modules, which torch refuses
``torch.save``              to a temporary name, then renamed: a killed run leaves no torn checkpoint
=========================== ===========================================================================

With ``--loss clip`` only the first, ``--reference-crop``, ``--zeroshot-data`` and the DDP fix apply. The
rest hangs on official torch hooks: the optimizer's step (EMA) and its ``state_dict`` (checkpoint). A
checkpoint is open_clip's own; the plugin adds one key, ``checkpoint["optimizer"]["otter"]``, that stock
open_clip ignores.
"""

from __future__ import annotations

import contextlib
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import open_clip
import torch
import torch.distributed as dist
from open_clip import ClipLoss
from open_clip_train import main as open_clip_main
from open_clip_train import params
from open_clip_train import train as open_clip_train_loop
from torch import Tensor, nn

from otter_openclip.losses import MAX_LOG_SCALE, DistillationLoss, LabelSmoothingLoss, OtterLoss
from otter_openclip.preprocessing import reference_transforms
from otter_openclip.teacher import EmaTeacher
from otter_openclip.training.arguments import TEACHER_LOSSES, plugin_flags, settings
from otter_openclip.training.repeatable import make_repeatable, seed_process
from otter_openclip.training.wrapper import StudentWithTeacher
from otter_openclip.training.zeroshot import BestCheckpoint, ZeroShotEvaluation, due

SUPPORTED = ((3, 2), (4, 0))
CHECKPOINT_KEY = "otter"
# With --zeroshot-data: an entry of get_data's dict that makes open_clip evaluate, without data.
_ZEROSHOT_KEY = "imagenet-v2"
_NO_DATA = object()

# Taken before anything is replaced.
_stock_train_one_epoch = open_clip_main.train_one_epoch
_stock_create_model = open_clip_main.create_model_and_transforms
_stock_get_data = open_clip_main.get_data
_stock_zero_shot_eval = open_clip_train_loop.zero_shot_eval
_stock_pt_load = open_clip_main.pt_load
_stock_ddp = nn.parallel.DistributedDataParallel
_stock_save = torch.save


def main(argv: Sequence[str], prog: str = "otter-openclip train") -> int:
    """Train with open_clip_train's flags and the plugin's; returns the exit code.

    Raises:
        SystemExit: on bad flags, unsupported mixes or an open_clip outside the supported range, all
            before any data are read.
    """
    check_open_clip_version(open_clip.__version__)
    run = _Run(prog)
    with contextlib.ExitStack() as stack:
        for target, name, replacement in (
            (open_clip_main, "parse_args", run.parse_args),
            (open_clip_main, "create_model_and_transforms", run.create_model_and_transforms),
            (open_clip_main, "create_loss", run.create_loss),
            (open_clip_main, "pt_load", run.pt_load),
            (open_clip_main, "get_data", run.get_data),
            (open_clip_main, "train_one_epoch", run.train_one_epoch),
            (open_clip_train_loop, "zero_shot_eval", run.zero_shot_eval),
            (nn.parallel, "DistributedDataParallel", _DistributedDataParallel),
            (torch, "save", run.save),
        ):
            stack.enter_context(mock.patch.object(target, name, replacement))
        result = open_clip_main.main(list(argv))
    return 1 if result == -1 else 0


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


class LoggedLosses(dict):
    """Loss terms by name; ``items`` also has the scalars that are logged but not added to the loss.

    open_clip's loop adds up ``values()`` and logs ``items()``.
    """

    def __init__(self, losses: dict[str, Tensor], logged: dict[str, Tensor]) -> None:
        super().__init__(losses)
        self.logged = logged

    def items(self) -> list[tuple[str, Tensor]]:
        """Loss terms, then logged scalars."""
        return [*super().items(), *self.logged.items()]


def _log_with_statistics(loss: DistillationLoss) -> Callable[..., LoggedLosses]:
    def call(logit_scale: Tensor, **features: Any) -> LoggedLosses:
        losses = loss(logit_scale=logit_scale, **features)
        scale = loss.distill_scale(logit_scale).detach()
        return LoggedLosses(losses, {"distill_scale": scale, **loss.target_statistics})

    return call


class _Run:
    """One call of open_clip's ``main``: what its replaced functions must know of each other."""

    def __init__(self, prog: str) -> None:
        self.prog = prog
        self.args: Namespace | None = None
        self.fixed_teacher: nn.Module | None = None
        self.resumed: dict[str, Any] | None = None
        self.model: StudentWithTeacher | None = None
        self.zeroshot: ZeroShotEvaluation | None = None
        self.training: tuple[torch.optim.Optimizer, Any] | None = None
        self.best: BestCheckpoint | None = None

    @property
    def stock(self) -> bool:
        return self.args is None or self.args.loss == "clip"

    def parse_args(self, argv: Sequence[str]) -> Namespace:
        with plugin_flags(self.prog):
            self.args = params.parse_args(argv)
        return self.args

    def save(self, obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if self.stock or not isinstance(f, str | os.PathLike):
            return _stock_save(obj, f, *args, **kwargs)
        temporary = f"{os.fspath(f)}.tmp"
        _stock_save(obj, temporary, *args, **kwargs)
        os.replace(temporary, f)

    def create_model_and_transforms(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        made = _stock_create_model(*args, **kwargs)
        if self.args.teacher_model is not None:
            self.fixed_teacher, _, _ = _stock_create_model(
                self.args.teacher_model,
                self.args.teacher_pretrained,
                device=kwargs["device"],
                precision=self.args.precision,
                output_dict=True,
                cache_dir=self.args.cache_dir,
            )
            self.fixed_teacher.requires_grad_(False)
        if self.args.reference_crop:
            model, *_ = made
            return model, *reference_transforms(model.visual.preprocess_cfg)
        return made

    def pt_load(self, path: str, map_location: Any = None) -> Any:
        checkpoint = _stock_pt_load(path, map_location=map_location)
        if not self.stock and "epoch" in checkpoint:
            # The rest of the optimizer's state as well: its group for s_d is loaded with the others.
            self.resumed = checkpoint["optimizer"]
        return checkpoint

    def get_data(
        self, args: Namespace, preprocess_fns: tuple[Any, Any], *rest: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if args.zeroshot_data is not None:
            try:
                self.zeroshot = ZeroShotEvaluation(args.zeroshot_data, preprocess_fns[1])
            except (ValueError, OSError) as error:
                raise SystemExit(f"{self.prog}: error: {error}") from error
        data = _stock_get_data(args, preprocess_fns, *rest, **kwargs)
        if not self.stock:
            make_repeatable(data, seed=args.seed, rank=args.rank)
        if self.zeroshot is not None:
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
        own = {name: value for name, value in data.items() if value is not _NO_DATA}
        metrics = _stock_zero_shot_eval(model, own, epoch, args, tokenizer=tokenizer)
        if self.zeroshot is None or not due(epoch, args):
            return metrics
        found = self.zeroshot.metrics(model, tokenizer, epoch, args)
        if self.training is not None and args.save_logs:
            if self.best is None:
                self.best = BestCheckpoint(args.checkpoint_path, resumed=args.resume is not None)
            self.best.offer(found, lambda: self._checkpoint(model, epoch))
        return {**metrics, **found}

    def _checkpoint(self, model: nn.Module, epoch: int) -> dict[str, Any]:
        """What open_clip's ``main`` saves after an epoch."""
        optimizer, scaler = self.training
        state = {
            "epoch": epoch,
            "name": self.args.name,
            "state_dict": getattr(model, "_orig_mod", model).state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        return state if scaler is None else {**state, "scaler": scaler.state_dict()}

    def create_loss(self, args: Namespace) -> nn.Module:
        if self.stock:
            return open_clip.create_loss(args)
        common = {
            "local_loss": args.local_loss,
            "gather_with_grad": args.gather_with_grad,
            "rank": args.rank,
            "world_size": args.world_size,
        }
        if args.loss == "infonce":
            return ClipLoss(cache_labels=True, **common)
        common["impl"] = args.loss_impl
        if args.loss == "ls":
            return LabelSmoothingLoss(args.label_smoothing, **common)
        common |= {
            "alpha": args.alpha,
            "vv_coef": args.vv_coef,
            "tt_coef": args.tt_coef,
            "share_logit_scale": args.share_logit_scale,
        }
        if args.loss == "kd":
            loss = DistillationLoss(teacher_scale=args.distill_T_t, **common)
        else:
            loss = OtterLoss(
                epsilon=args.sinkhorn_lambda,
                iterations=args.sinkhorn_iter,
                remove_diagonal=not args.keep_diag,
                ot_scope=args.ot_scope,
                **common,
            )
        return loss.to(args.device)

    def train_one_epoch(
        self,
        model: nn.Module,
        data: dict[str, Any],
        loss: nn.Module,
        epoch: int,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        args = self.args
        self.training = (optimizer, scaler)
        rest = (scaler, *rest)
        if self.stock:
            return _stock_train_one_epoch(model, data, loss, epoch, optimizer, *rest, **kwargs)
        if self.model is None:
            self.model = self._attach(model, loss, optimizer)
        self.model.start_epoch()
        seed_process(args.seed, args.rank, epoch)
        call = _log_with_statistics(loss) if isinstance(loss, DistillationLoss) else loss
        _stock_train_one_epoch(self.model, data, call, epoch, optimizer, *rest, **kwargs)

    def _attach(
        self, model: nn.Module, loss: nn.Module, optimizer: torch.optim.Optimizer
    ) -> StudentWithTeacher:
        """Hang teacher, second scale and checkpoint entry on the student and its optimizer."""
        args = self.args
        saved = (self.resumed or {}).get(CHECKPOINT_KEY)
        if self.resumed is not None:
            _check_resumed(saved, settings(args))

        ema = None
        if args.loss in TEACHER_LOSSES and self.fixed_teacher is None:
            ema = EmaTeacher(model, args.ema_decay, eval_mode=args.teacher_mode == "eval")
            if saved and "teacher" in saved:
                ema.load_state_dict({"module": saved["teacher"], **saved["teacher_state"]})
            optimizer.register_step_post_hook(lambda *_: ema.update(model))
            logging.info(
                f"EMA teacher: decay {args.ema_decay}, {args.teacher_mode} mode, "
                f"{ema.num_updates} updates so far"
            )
        elif self.fixed_teacher is not None:
            logging.info(f"Fixed teacher: {args.teacher_model} ({args.teacher_pretrained})")

        scale = getattr(loss, "distill_logit_scale", None)
        if scale is not None:
            _add_scale(optimizer, scale, self.resumed, args)
        self.resumed = None

        def add_entry(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            entry: dict[str, Any] = {"settings": settings(args)}
            if scale is not None:
                *groups, group = state["param_groups"]
                (index,) = group["params"]
                entry["distill_logit_scale"] = scale.detach()
                entry["distill_logit_scale_group"] = group
                entry["distill_logit_scale_state"] = state["state"].get(index)
                kept = {k: v for k, v in state["state"].items() if k != index}
                state = state | {"param_groups": groups, "state": kept}
            if ema is not None:
                teacher = ema.state_dict()
                entry["teacher"] = teacher.pop("module")
                entry["teacher_state"] = teacher
            return state | {CHECKPOINT_KEY: entry}

        optimizer.register_state_dict_post_hook(add_entry)

        teacher = ema.module if ema is not None else self.fixed_teacher
        compiled = torch.compile(teacher) if args.torchcompile and teacher is not None else None
        return StudentWithTeacher(
            model,
            teacher,
            teacher_forward=compiled,
            train_teacher=ema is not None and not ema.eval_mode,
            accum_freq=args.accum_freq,
            distill_logit_scale=scale,
        )


def _check_resumed(saved: dict[str, Any] | None, now: dict[str, Any]) -> None:
    if saved is None:
        logging.warning(
            "The resumed checkpoint was not written with this plugin's losses: the teacher starts as a "
            "copy of the student and the distillation scale from its initial value."
        )
        return
    then = saved["settings"]
    changed = [
        f"{name}: {then.get(name, 'unset')} -> {now.get(name, 'unset')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if changed:
        logging.warning(f"Resuming with other settings than before: {', '.join(changed)}")


def _add_scale(
    optimizer: torch.optim.Optimizer,
    scale: nn.Parameter,
    resumed: dict[str, Any] | None,
    args: Namespace,
) -> None:
    """Let ``optimizer`` learn the log of s_d, last in its groups, with the state of ``resumed``."""
    optimizer.add_param_group({"params": [scale], "weight_decay": 0.0})
    saved = (resumed or {}).get(CHECKPOINT_KEY) or {}
    if "distill_logit_scale" in saved:
        with torch.no_grad():
            scale.copy_(saved["distill_logit_scale"])
        group, state = saved["distill_logit_scale_group"], saved["distill_logit_scale_state"]
        (index,) = group["params"]
        optimizer.load_state_dict(
            {
                "param_groups": [*resumed["param_groups"], group],
                "state": resumed["state"] | ({} if state is None else {index: state}),
            }
        )

    def clamp(*_: Any) -> None:
        with torch.no_grad():
            scale.clamp_(0.0, MAX_LOG_SCALE)  # as open_clip's loop does with logit_scale

    optimizer.register_step_post_hook(clamp)

    def average(gradient: Tensor) -> Tensor:
        # Not one of the model's parameters, so DDP does not see it; and with accumulation the whole
        # batch's loss is differentiated once for each micro-batch.
        gradient = gradient / (args.world_size * args.accum_freq)
        if args.world_size > 1:
            dist.all_reduce(gradient)
        return gradient

    scale.register_hook(average)
