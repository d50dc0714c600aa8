"""The plugin: what ``--loss`` changes in the steps of open_clip_train 3.x's ``main``.

``Plugin`` is what ``patches/open_clip_torch-3.3.0.patch`` looks for in the entry-point group
``open_clip_train.losses``; with the package as released ``launcher`` calls the same hooks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import open_clip
import torch
from open_clip_train.data import DataInfo
from open_clip_train.distributed import is_master
from timm.utils import unwrap_model
from torch import Tensor, nn

from otter_openclip.checkpoints.contents import write_file
from otter_openclip.checkpoints.newest import LATEST, epoch_of, newest_checkpoint
from otter_openclip.frozen.loader import use_features
from otter_openclip.frozen.prefix import find_prefixes, install, no_prefix_message
from otter_openclip.preprocessing import reference_transforms
from otter_openclip.training import batch_norm, flags, order, watch
from otter_openclip.training.ending import Ending, Steps, goes_on_from
from otter_openclip.training.fixed_teacher import FixedTeacher
from otter_openclip.training.objectives import Objective
from otter_openclip.training.resume import Resume, plugin_entries, read_resumed
from otter_openclip.training.scale import add_scale
from otter_openclip.training.student_with_teacher import (
    MovingAverage,
    StudentWithTeacher,
    Teacher,
)
from otter_openclip.training.zeroshot import BestCheckpoint, ZeroShotEvaluation, due, evaluated

_LONGEST = 1000  # characters of a message; torch's of weights that do not fit list every key
# Entry of the data dict that stands for --zeroshot-data.
ZEROSHOT_DATA = "zeroshot-data"


class Plugin:
    """The hooks of one run: ``ClipPlugin``'s where training is open_clip's own, else its heir's."""

    def __init__(self, prog: str | None = None) -> None:
        """``prog`` is the command's name in messages, by default the one it was called by."""
        self._prog = prog
        self.hooks: ClipPlugin | None = None

    def parse_args(self, parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
        """Arguments: ``parser``, open_clip_train's, also gets the plugin's flags."""
        parser.prog = self._prog or parser.prog
        args = flags.parse(parser, argv)
        stock = args.loss == "clip" and args.ema_decay is None
        self.hooks = (ClipPlugin if stock else TrainingPlugin)(args, parser.prog)
        return args

    def __getattr__(self, name: str) -> Any:
        return getattr(self.hooks, name)


class ClipPlugin:
    """``--loss clip``: what this package has for open_clip's own training.

    That is ``--reference-crop``, ``--feature-cache`` and ``--zeroshot-data``. The other hooks are the
    steps of open_clip's own.
    """

    locks_are_frozen = False  # whether a locked tower is in eval mode and without augmentation

    def __init__(self, args: Namespace, prog: str) -> None:
        self.args, self._prog = args, prog
        self.model: nn.Module | None = None
        self.training: tuple[torch.optim.Optimizer, Any] | None = None
        self._train_transform: Any = None
        self._prefixes: dict[str, str] | None = None
        self._train: DataInfo | None = None
        self._zeroshot: ZeroShotEvaluation | None = None
        self._best: BestCheckpoint | None = None

    def refuse(self, fault: Any, error: Exception | None = None) -> NoReturn:
        """End the command with one line, however many torch or transformers needs."""
        text = textwrap.shorten(str(fault), _LONGEST, placeholder=" ...")
        raise SystemExit(f"{self._prog}: error: {text}") from error

    @contextlib.contextmanager
    def faults_named(self) -> Iterator[None]:
        """A fault of the input ends the command with one line."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.refuse(error, error)

    def setup_model(
        self, args: Namespace, model: nn.Module, preprocess_train: Any, preprocess_val: Any
    ) -> tuple[nn.Module, Any, Any]:
        """Model: its transforms under ``--reference-crop`` and of a frozen image tower."""
        self.model = model
        if args.reference_crop:
            with self.faults_named():
                preprocess_train, preprocess_val = reference_transforms(model.visual.preprocess_cfg)
        self._train_transform = preprocess_train
        if not (args.feature_cache or self.locks_are_frozen) or not args.lock_image:
            return model, preprocess_train, preprocess_val
        if args.lock_image_freeze_bn_stats:
            batch_norm.leave_batch_norm(model)
        if not args.lock_image_unlocked_groups and not args.aug_cfg and args.feature_views == 1:
            preprocess_train = preprocess_val
            logging.info("Frozen image tower: images without augmentation; --aug-cfg adds it")
        return model, preprocess_train, preprocess_val

    def load_checkpoint(self, path: str) -> Any:
        """Checkpoint load, without running any of its code."""
        with self.faults_named():
            return read_resumed(path)

    def setup_data(
        self, args: Namespace, data: dict[str, Any], preprocess_val: Any
    ) -> dict[str, Any]:
        """Data: features in their place, ``--zeroshot-data``, and an end where there is no batch."""
        self._train = data.get("train")
        if self._train is not None:
            if args.feature_cache is not None:
                transform = self._train_transform if args.feature_views > 1 else preprocess_val
                with self.faults_named():
                    self._use_features(args, self._train, transform)
            watch.watch_passes(args, self._train)
        if args.zeroshot_data is not None:
            with self.faults_named():
                self._zeroshot = ZeroShotEvaluation(args.zeroshot_data, preprocess_val)
            data[ZEROSHOT_DATA] = self._zeroshot
        return data

    def _use_features(self, args: Namespace, train: DataInfo, transform: Any) -> None:
        prefixes = self.prefixes()
        for tower, locked in (("visual", args.lock_image), ("text", args.lock_text)):
            if locked and tower not in prefixes:
                raise ValueError(no_prefix_message(self.model, tower))
        use_features(args, train, self.model, prefixes, transform)

    def prefixes(self) -> dict[str, str]:
        """The frozen prefixes of the model, which from the first call on takes their output too."""
        if self._prefixes is None:
            self._prefixes = find_prefixes(self.model)
            install(self.model, self._prefixes)
        return self._prefixes

    def create_loss(self, args: Namespace) -> Callable[..., dict[str, Tensor]]:
        """Loss."""
        return open_clip.create_loss(args)

    def wrap_model(self, args: Namespace, model: nn.Module) -> nn.Module:
        """Model wrapper."""
        return model

    def setup_optimizer(
        self, args: Namespace, optimizer: torch.optim.Optimizer, scaler: Any
    ) -> None:
        """Optimizer; the last moment before work begins, for what ``--zeroshot-data`` would cost."""
        self.training = (optimizer, scaler)
        if self._zeroshot is not None and is_master(args):
            with self.faults_named():
                self._zeroshot.read_ahead(self.model, args)

    def start_epoch(self, args: Namespace, epoch: int) -> None:
        """Epoch."""

    def end_epoch(self) -> None:
        """By ``launcher`` alone: after an epoch's last step."""

    def failed(self) -> None:
        """By ``launcher`` alone: an epoch ends with an error."""

    def judged(self, model: nn.Module) -> nn.Module:
        """The model that ``--zeroshot-data`` evaluates."""
        return model

    def evaluate(
        self, args: Namespace, model: nn.Module, epoch: int, tokenizer: Any
    ) -> dict[str, float]:
        """Evaluation: metrics of ``--zeroshot-data`` to add to open_clip's; keeps ``best.pt``."""
        if self._zeroshot is None or not due(epoch, args):
            return {}
        judged = self.judged(model)
        try:
            with evaluated(judged):
                metrics = self._zeroshot.metrics(judged, tokenizer, epoch, args)
        except (ValueError, OSError, RuntimeError) as error:  # the last: a loader's process died
            if self.training is None:  # nothing but this evaluation was asked for
                self.refuse(f"--zeroshot-data: {error}", error)
            logging.error(f"--zeroshot-data is not evaluated after epoch {epoch}: {error}")
            return {}
        if self.training is not None and args.save_logs:
            if self._best is None:
                criterion, resumed = self._zeroshot.criterion, args.resume is not None
                self._best = BestCheckpoint(args.checkpoint_path, criterion, resumed=resumed)

            def make() -> dict[str, Any]:
                return self.complete(self.make_checkpoint(args, model, epoch))

            self._best.offer(metrics, args.zeroshot_weights, make)
        return metrics

    def make_checkpoint(self, args: Namespace, model: nn.Module, epoch: int) -> dict[str, Any]:
        """What open_clip's ``main`` saves after an epoch."""
        optimizer, scaler = self.training
        state = {
            "epoch": epoch,
            "name": args.name,
            "state_dict": getattr(model, "_orig_mod", model).state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        return state if scaler is None else {**state, "scaler": scaler.state_dict()}

    def complete(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What open_clip saves after an epoch, and the plugin's part."""
        return checkpoint

    def save_checkpoint(self, checkpoint: Any, path: str | os.PathLike[str]) -> None:
        """Checkpoint save."""
        torch.save(checkpoint, path)

    def close(self) -> None:
        """After the run, however it ended: no process of its loader is left."""
        if self._train is None or self._train.shared_epoch is None:
            return
        loader = self._train.dataloader.pipeline[0]
        if (iterator := getattr(loader, "_iterator", None)) is not None:
            with contextlib.suppress(RuntimeError):  # one of them was killed
                iterator._shutdown_workers()


class TrainingPlugin(ClipPlugin):
    """The losses of this package, or an EMA beside ``--loss clip``: exact data order and resume.

    Attributes:
        objective: the loss, its scale and what is logged of it.
        teacher: where its targets come from; None for losses without one.
        resume: what a checkpoint had, until there is an optimizer.
        ending: SIGTERM.
    """

    locks_are_frozen = True

    def __init__(self, args: Namespace, prog: str) -> None:
        super().__init__(args, prog)
        self.locks_are_frozen = args.loss != "clip"
        self.resume, self.ending = Resume(args), Ending(args)
        self.objective: Objective | None = None
        self.teacher: Teacher | None = None
        self._student: nn.Module | None = None
        self._wrapper: StudentWithTeacher | None = None

    def setup_model(
        self, args: Namespace, model: nn.Module, preprocess_train: Any, preprocess_val: Any
    ) -> tuple[nn.Module, Any, Any]:
        """Model: the run's folder is claimed; the fixed teacher of ``--distill-model`` beside it."""
        with self.faults_named():
            self.resume.begin(args)
            if args.teacher_model is not None:
                self.teacher = FixedTeacher(args, model)
        return super().setup_model(args, model, preprocess_train, preprocess_val)

    def load_checkpoint(self, path: str) -> Any:
        """Checkpoint load: the plugin's part of it waits for the optimizer."""
        with self.faults_named():
            return self.resume.load(self.args, path)

    def setup_data(
        self, args: Namespace, data: dict[str, Any], preprocess_val: Any
    ) -> dict[str, Any]:
        """Data: every epoch's order follows from (seed, epoch, rank, worker)."""
        order.make_repeatable(data, seed=args.seed, rank=args.rank)
        if "train" in data:
            with self.faults_named():
                watch.check_loader(args, data["train"])
        data = super().setup_data(args, data, preprocess_val)
        if "train" in data:
            data["train"].dataloader = Steps(data["train"].dataloader, self.ending)
        return data

    def create_loss(self, args: Namespace) -> Callable[..., dict[str, Tensor]]:
        """Loss: the one that ``--loss`` names."""
        num_steps = self._train.dataloader.num_batches // args.accum_freq
        self.objective = Objective(args, num_steps)
        return self.objective

    def wrap_model(self, args: Namespace, model: nn.Module) -> nn.Module:
        """Model wrapper: what the loop trains has the teacher's features in its output."""
        self._student = model
        if args.loss == "clip":
            self.teacher = (
                MovingAverage(args, model, {}, eval_mode=True) if args.ema_decay else None
            )
            return model
        prefixes = self.prefixes()
        if args.feature_dropout and not prefixes:
            self.refuse(f"--feature-dropout: {no_prefix_message(self.model, 'visual')}")
        if args.loss in flags.TEACHER_LOSSES and self.teacher is None:
            if flags.has_ema(args):
                eval_mode = args.teacher_mode == "eval"
                self.teacher = MovingAverage(args, model, prefixes, eval_mode=eval_mode)
            else:
                self.teacher = Teacher(model if args.feature_dropout else None)
        if args.torchcompile and self.teacher is not None and self.teacher.module is not None:
            self.teacher.module.compile()
        locked = args.lock_image and args.lock_image_freeze_bn_stats
        frozen = batch_norm.locked_batch_norms(model) if locked else []
        self._wrapper = StudentWithTeacher(
            model,
            self.teacher,
            accum_freq=args.accum_freq,
            distill_logit_scale=self.objective.scale,
            frozen=[*frozen, *prefixes.values()],
            prefixes=prefixes,
            feature_dropout=args.feature_dropout,
        )
        return self._wrapper

    def setup_optimizer(
        self, args: Namespace, optimizer: torch.optim.Optimizer, scaler: Any
    ) -> None:
        """Optimizer: its step moves the EMA teacher, it learns s_d; what a checkpoint had comes back."""
        super().setup_optimizer(args, optimizer, scaler)
        if self.teacher is not None:
            optimizer.register_step_post_hook(self._after_step)
        if self.objective.scale is not None:
            add_scale(optimizer, self.objective.scale, args.accum_freq)
        with self.faults_named():
            self.resume.restore(args, optimizer, self.objective.scale, self.teacher)
        if self.teacher is not None:
            logging.info(str(self.teacher))
        self.ending.listen()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # A fused optimizer is called for a step that AMP skips too, and told so.
        if not getattr(optimizer, "found_inf", 0.0):
            self.teacher.update(self._student)

    def start_epoch(self, args: Namespace, epoch: int) -> None:
        """Epoch: its random numbers follow from (seed, rank, epoch), whatever ran before it."""
        if self.ending.asked:
            self._keep_epoch(args, epoch)
        self.ending.start_epoch(epoch)
        if self._wrapper is not None:
            self._wrapper.start_epoch()
        self.objective.start_epoch(epoch)
        order.seed_process(args.seed, args.rank, epoch)

    def _keep_epoch(self, args: Namespace, done: int) -> None:
        """End after ``done`` whole epochs, with a checkpoint if ``--save-frequency`` wanted none."""
        newest = newest_checkpoint(Path(args.checkpoint_path)) if args.save_logs else None
        if args.save_logs and (newest is None or epoch_of(newest) != done):
            name = LATEST if args.save_most_recent else f"epoch_{done}.pt"
            checkpoint = self.make_checkpoint(args, self._student, done)
            self.save_checkpoint(checkpoint, os.path.join(args.checkpoint_path, name))
        self.ending.leave(f"{done} epochs are whole")

    def end_epoch(self) -> None:
        """Before results or a checkpoint of an epoch are written: nothing in it is NaN or infinite."""
        if self.training is None:
            return
        self.objective.watch.check()
        watch.check_model("student", unwrap_model(self._student))
        watch.check_model("loss", self.objective.loss)
        if self.teacher is not None and self.teacher.module is not None:
            watch.check_model("teacher", self.teacher.module)
        watch.check_optimizer(self.training[0])

    def failed(self) -> None:
        """After SIGTERM the error is of ranks that heard of it before this one."""
        if self.ending.asked:
            self.ending.lose_epoch()

    def judged(self, model: nn.Module) -> nn.Module:
        """The student, or with ``--zeroshot-weights teacher`` its EMA."""
        if self.args.zeroshot_weights == "teacher":
            return self.teacher.ema.module
        return model

    def evaluate(
        self, args: Namespace, model: nn.Module, epoch: int, tokenizer: Any
    ) -> dict[str, float]:
        """Evaluation."""
        self.end_epoch()
        return super().evaluate(args, model, epoch, tokenizer)

    def complete(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What open_clip saves after an epoch, and the plugin's part."""
        self.end_epoch()
        optimizer = self.training[0]
        return checkpoint | plugin_entries(self.args, optimizer, self.objective.scale, self.teacher)

    def save_checkpoint(self, checkpoint: Any, path: str | os.PathLike[str]) -> None:
        """Checkpoint save: with the plugin's part, whole or not at all."""
        try:
            write_file(path, self.complete(checkpoint))
        except OSError as error:
            epoch, then = checkpoint["epoch"], goes_on_from(self.args)
            fault = f"{path} cannot be written ({error}), so epoch {epoch} is lost"
            self.refuse(f"{fault}; make room, then {then}", error)

    def close(self) -> None:
        """After the run: its loader's processes end, and others may write to its folder."""
        super().close()
        self.resume.end()
