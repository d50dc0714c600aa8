"""The plugin: what ``--loss`` changes in the steps of open_clip_train 3.x's ``main``.

Its methods are the hooks that ``patches/open_clip_torch-3.3.0.patch`` gives open_clip_train for the
entry-point group ``open_clip_train.losses``; in the package as released ``open_clip_v3`` calls them.
With ``--loss clip`` all but ``--reference-crop`` and ``--zeroshot-data`` is open_clip's; with
``--ema-decay`` too an EMA is kept beside it, and data order and resume are those of the other losses.
"""

from __future__ import annotations

import contextlib
import logging
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip_train.data import DataInfo
from timm.utils import unwrap_model
from torch import Tensor, nn

from otter_openclip.checkpoints.contents import ENTRY, TEACHER, write_file
from otter_openclip.checkpoints.newest import LATEST, epoch_of, newest_checkpoint
from otter_openclip.frozen.prefix import find_prefixes, install, left_out, no_prefix_message
from otter_openclip.preprocessing import reference_transforms
from otter_openclip.teacher import EmaTeacher
from otter_openclip.training import batch_norm, fixed_teacher, flags, order, resume, scale, watch
from otter_openclip.training.ending import Ending, Steps, goes_on_from
from otter_openclip.training.finite import LossWatch, check_model, check_optimizer, keep_keys
from otter_openclip.training.guidance import advice
from otter_openclip.training.objectives import create_loss, log_statistics
from otter_openclip.training.student_with_teacher import StudentWithTeacher, as_teacher
from otter_openclip.training.target_images import TargetImages, wanted
from otter_openclip.training.zeroshot import BestCheckpoint, ZeroShotEvaluation, due, evaluated

# Entry of the data dict that stands for --zeroshot-data.
ZEROSHOT_DATA = "zeroshot-data"


class TrainingPlugin:
    """One run of open_clip_train's ``main``: the hooks, in the order in which they are called."""

    def __init__(self, prog: str | None = None) -> None:
        """``prog`` is the command's name in messages, by default the one it was called by."""
        self._prog = prog
        self._args: Namespace | None = None
        self.fixed_teacher: nn.Module | None = None
        self._model: nn.Module | None = None
        self._augmentation: Any = None
        self._prefixes: dict[str, str] | None = None
        self._resumed: dict[str, Any] | None = None
        self._zeroshot: ZeroShotEvaluation | None = None
        self._train: DataInfo | None = None
        self._loss: nn.Module | None = None
        self._student: nn.Module | None = None
        self.ema: EmaTeacher | None = None
        self._train_model: StudentWithTeacher | None = None
        self.training: tuple[torch.optim.Optimizer, Any] | None = None
        self._watch: LossWatch | None = None
        self._best: BestCheckpoint | None = None
        self._advised = False
        self.ending = Ending()
        self._latest = False
        self._claim: Any = None
        self._images: TargetImages | None = None

    @property
    def stock(self) -> bool:
        """Whether the training itself is open_clip's own."""
        return self._args is None or self._args.loss == "clip"

    @property
    def untouched(self) -> bool:
        """Whether data order and checkpoints are, too."""
        return self.stock and (self._args is None or self._args.ema_decay is None)

    def parse_args(self, parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
        """Arguments: ``parser``, open_clip_train's, also gets the plugin's flags."""
        parser.prog = self._prog = self._prog or parser.prog
        self._args = flags.parse(parser, argv)
        self._latest = self._args.resume == "latest"
        return self._args

    def setup_model(
        self, args: Namespace, model: nn.Module, preprocess_train: Any, preprocess_val: Any
    ) -> tuple[nn.Module, Any, Any]:
        """Model: the fixed teacher of ``--distill-model`` beside it; ``--reference-crop``."""
        if args.loss in flags.PAIR_LOSSES and getattr(model, "logit_bias", None) is not None:
            raise SystemExit(f"{self._prog}: error: {flags.logit_bias_message(args)}")
        if message := watch.fault(args):
            raise SystemExit(f"{self._prog}: error: {message}")
        if not self.untouched:
            with self._faults_named():
                self._claim = resume.claim_folder(args)
            if self._latest:
                args.resume = resume.latest(args)
        frozen_towers = args.feature_cache is not None or not self.stock
        if args.lock_image and args.lock_image_freeze_bn_stats and frozen_towers:
            batch_norm.leave_batch_norm(model)
        if args.teacher_model is not None:
            with self._faults_named():
                self.fixed_teacher = fixed_teacher.create(args, model)
        if args.reference_crop:
            preprocess_train, preprocess_val = reference_transforms(model.visual.preprocess_cfg)
        self._model, self._augmentation = model, preprocess_train
        locked = frozen_towers and args.lock_image and not args.lock_image_unlocked_groups
        if locked and not args.aug_cfg and (args.feature_views or 1) == 1:
            preprocess_train = preprocess_val
            logging.info("Frozen image tower: images without augmentation; --aug-cfg adds it")
        return model, preprocess_train, preprocess_val

    def load_checkpoint(self, path: str) -> Any:
        """Checkpoint load: the plugin's part of it waits for the optimizer."""
        with self._faults_named():
            loaded = self.fitted(resume.read(path))
        if not self.untouched and "epoch" in loaded:  # weights alone can be evaluated
            self._resumed = {key: loaded.get(key) for key in (ENTRY, TEACHER)}
        return loaded

    def fitted(self, loaded: Any) -> Any:
        """A checkpoint as ``main`` looks for it, or a fault that says why it cannot be resumed."""
        return resume.fitted(self._args, loaded, self._model)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """The optimizer's part of a checkpoint, which may be one of another kind."""
        with self._faults_named():
            resume.load_optimizer(self._args, optimizer, state)

    def setup_data(
        self, args: Namespace, data: dict[str, Any], preprocess_val: Any
    ) -> dict[str, Any]:
        """Data: every epoch's order follows from (seed, epoch, rank, worker); ``--zeroshot-data``."""
        if not self.untouched:
            order.make_repeatable(data, seed=args.seed, rank=args.rank)
        if "train" in data:
            with self._faults_named():
                watch.check_loader(args, data["train"])
        if args.feature_cache is not None:
            self._use_features(args, data["train"], preprocess_val)
        if "train" in data:
            watch.watch(args, data["train"])
            if not self.untouched and (cut := watch.cut_off(args)):
                shards = f"{', '.join(cut[:5])}{' ...' * (len(cut) > 5)}"
                logging.warning(f"{len(cut)} shards of --train-data end too early: {shards}")
        self._train = data.get("train")
        if args.zeroshot_data is not None:
            with self._faults_named():
                self._zeroshot = ZeroShotEvaluation(args.zeroshot_data, preprocess_val)
            data[ZEROSHOT_DATA] = self._zeroshot
        if "train" in data and not self.untouched:
            data["train"].dataloader = Steps(data["train"].dataloader, self.ending)
        return data

    @contextlib.contextmanager
    def _faults_named(self) -> Iterator[None]:
        """A fault of the input ends the command with one line."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise SystemExit(f"{self._prog}: error: {error}") from error

    def _use_features(self, args: Namespace, train: DataInfo, preprocess_val: Any) -> None:
        from otter_openclip.frozen.cached import use_features  # not for open_clip 4.x

        self._prefixes = prefixes = find_prefixes(self._model)
        for tower, flag in (("visual", "lock_image"), ("text", "lock_text")):
            if getattr(args, flag) and tower not in prefixes:
                raise SystemExit(f"{self._prog}: error: {no_prefix_message(self._model, tower)}")
        install(self._model, prefixes)
        transform = self._augmentation if args.feature_views > 1 else preprocess_val
        use_features(args, train, self._model, prefixes, transform)

    def create_loss(self, args: Namespace) -> Callable[..., dict[str, Tensor]]:
        """Loss: the one that ``--loss`` names."""
        self._loss = create_loss(args)
        if self.stock:
            return self._loss
        if wanted(self._loss, args) and self._train is not None:
            steps = self._train.dataloader.num_batches // args.accum_freq
            self._images = TargetImages(self._loss, args, steps)
        return log_statistics(self._loss, self._images and self._images.seen)

    def wrap_model(self, args: Namespace, model: nn.Module) -> nn.Module:
        """Model wrapper: what the loop trains has the teacher's features in its output."""
        self._student = model
        if self.stock:
            if flags.has_ema(args):
                self.ema = self._make_ema(args, model, self._prefixes or {}, eval_mode=True)
            return model
        prefixes = self._prefixes  # installed for --feature-cache
        if prefixes is None:
            prefixes = find_prefixes(unwrap_model(model))
            install(unwrap_model(model), prefixes)
        if args.loss in flags.TEACHER_LOSSES and self.fixed_teacher is None:
            eval_mode = args.teacher_mode == "eval"
            self.ema = self._make_ema(args, model, prefixes, eval_mode=eval_mode)
        teacher = self.fixed_teacher if self.ema is None else self.ema.module
        compiled = torch.compile(teacher) if args.torchcompile and teacher is not None else None
        self._train_model = StudentWithTeacher(
            model,
            teacher,
            teacher_forward=compiled,
            train_teacher=self.ema is not None and not self.ema.eval_mode,
            accum_freq=args.accum_freq,
            distill_logit_scale=self.scale,
            frozen=[*self.frozen_modules(args, model), *prefixes.values()],
            prefixes=prefixes,
            shares_prefixes=self.ema is not None,
        )
        return self._train_model

    def _make_ema(
        self, args: Namespace, model: nn.Module, prefixes: dict[str, str], *, eval_mode: bool
    ) -> EmaTeacher:
        """A copy of ``model`` that shares its ``prefixes``."""
        with left_out(unwrap_model(model), prefixes.values()) as copies:
            ema = EmaTeacher(model, args.ema_decay, eval_mode=eval_mode)
            copies.append(as_teacher(ema.module))
        return ema

    def frozen_modules(self, args: Namespace, model: nn.Module) -> list[str]:
        """Names of the modules that stay in eval mode."""
        wanted = args.lock_image and args.lock_image_freeze_bn_stats
        return batch_norm.locked_batch_norms(model) if wanted else []

    @property
    def scale(self) -> nn.Parameter | None:
        """The log of s_d, if the loss has one."""
        return getattr(self._loss, "distill_logit_scale", None)

    def setup_optimizer(
        self, args: Namespace, optimizer: torch.optim.Optimizer, scaler: Any
    ) -> None:
        """Optimizer: its step moves the EMA teacher, it learns s_d; what a checkpoint had comes back."""
        self.training = (optimizer, scaler)
        if self.untouched:
            return
        steps = self._train.dataloader.num_batches // args.accum_freq
        rhythm = {"accum_freq": args.accum_freq, "every": args.log_every_n_steps, "steps": steps}
        self._watch = LossWatch(self._loss, **rhythm)
        keep_keys(self._train, self._watch)
        # The optimizer's hook makes a circle with this object: no loader's processes in it.
        self._train = None
        if self.ema is not None:
            optimizer.register_step_post_hook(self._after_step)
        if self.scale is not None:
            scale.add_scale(optimizer, self.scale, args)
        if self._resumed is not None:
            entry, teacher = (self._resumed[key] for key in (ENTRY, TEACHER))
            scale.restore(entry, teacher, args, optimizer, self.scale, self.ema)
            self._resumed = None
        if self.ema is not None:
            mode = "eval" if self.ema.eval_mode else "train"
            logging.info(
                f"EMA teacher: decay {args.ema_decay}, {mode} mode, "
                f"{self.ema.num_updates} updates so far"
            )
        elif self.fixed_teacher is not None:
            logging.info(f"Fixed teacher: {args.teacher_model} ({args.teacher_pretrained})")

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # A fused optimizer is called for a step that AMP skips too, and told so.
        if not getattr(optimizer, "found_inf", 0.0):
            self.update_teacher()

    def update_teacher(self) -> None:
        """After each optimizer step."""
        self.ema.update(self._student)

    def start_epoch(self, args: Namespace, epoch: int) -> None:
        """Epoch: its random numbers follow from (seed, rank, epoch), whatever ran before it."""
        if self.untouched:
            return
        if self.ending.asked:
            self._keep_epoch(args, epoch)
        self.ending.start_epoch(args, epoch)
        if self._train_model is not None:
            self._train_model.start_epoch()
        self._watch.start_epoch(epoch)
        if self._images is not None:
            self._images.start_epoch(epoch)
        if not self._advised and (found := getattr(self._loss, "target_statistics", None)):
            self._advised = True  # an epoch of this process is done
            if text := advice(found, args):
                logging.warning(text)
        order.seed_process(args.seed, args.rank, epoch)

    def _keep_epoch(self, args: Namespace, done: int) -> None:
        """End after ``done`` whole epochs, with a checkpoint if ``--save-frequency`` wanted none."""
        newest = newest_checkpoint(Path(args.checkpoint_path)) if args.save_logs else None
        if args.save_logs and (newest is None or epoch_of(newest) != done):
            name = LATEST if args.save_most_recent else f"epoch_{done}.pt"
            made = self.make_checkpoint(args, self._student, done)
            self.save_checkpoint(made, os.path.join(args.checkpoint_path, name))
        self.ending.leave(f"{done} epochs are whole")

    def evaluate(
        self, args: Namespace, model: nn.Module, epoch: int, tokenizer: Any
    ) -> dict[str, float]:
        """Evaluation: metrics of ``--zeroshot-data`` to add to open_clip's; keeps ``best.pt``."""
        self.check_finite()
        if self._zeroshot is None or not due(epoch, args):
            return {}
        judged = self.ema.module if args.zeroshot_weights == "teacher" else model
        try:
            with evaluated(judged):
                found = self._zeroshot.metrics(judged, tokenizer, epoch, args)
        except (ValueError, OSError, RuntimeError) as error:  # the last: a loader's process died
            if self.training is None:  # nothing but this evaluation was asked for
                raise SystemExit(f"{self._prog}: error: --zeroshot-data: {error}") from error
            logging.error(f"--zeroshot-data is not evaluated after epoch {epoch}: {error}")
            return {}
        if self.training is not None and args.save_logs:
            if self._best is None:
                self._best = BestCheckpoint(args.checkpoint_path, resumed=args.resume is not None)
            make = lambda: self.complete(self.make_checkpoint(args, model, epoch))  # noqa: E731
            self._best.offer(found, args.zeroshot_weights, make)
        return found

    def save_checkpoint(self, checkpoint_dict: Any, path: str | os.PathLike[str]) -> None:
        """Checkpoint save: with the plugin's part, whole or not at all."""
        if self.untouched:
            torch.serialization.save(checkpoint_dict, path)
            return
        try:
            write_file(path, self.complete(checkpoint_dict))
        except OSError as error:
            raise SystemExit(
                f"{self._prog}: error: {path} cannot be written ({error}), so epoch "
                f"{checkpoint_dict['epoch']} is lost; make room, then {goes_on_from(self._args)}"
            ) from error

    def complete(self, checkpoint_dict: dict[str, Any]) -> dict[str, Any]:
        """What open_clip saves after an epoch, and the plugin's part."""
        if self.untouched or self.training is None or "optimizer" not in checkpoint_dict:
            return checkpoint_dict
        self.check_finite()
        entry = scale.make_entry(self._args, self.training[0], self.scale, self.ema)
        teacher = {} if self.ema is None else {TEACHER: self.ema.module.state_dict()}
        return {**checkpoint_dict, **teacher, ENTRY: entry}

    def check_finite(self) -> None:
        """After an epoch, before results or a checkpoint of it are written."""
        if self._watch is None:
            return
        self._watch.check()
        check_model("student", unwrap_model(self._student))
        check_model("loss", self._loss)
        if self.ema is not None:
            check_model("teacher", self.ema.module)
        check_optimizer(self.training[0])

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

    def let_go(self) -> None:
        """Let go of the data, after the run and however it ended."""
        self._train = self._zeroshot = None
