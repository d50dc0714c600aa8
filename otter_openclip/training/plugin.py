"""The plugin: what ``--loss`` changes in the steps of open_clip_train 3.x's ``main``.

``Plugin`` is what ``patches/open_clip_torch-3.3.0.patch`` looks for in the entry-point group
``open_clip_train.losses``; with the package as released ``launcher`` calls the same hooks.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import open_clip
from open_clip_train.data import DataInfo
from open_clip_train.distributed import is_master
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.optim import Optimizer

from otter_openclip.checkpoints.contents import ENTRY, write_file
from otter_openclip.closed_form.listing import weights_of
from otter_openclip.frozen.loader import add_weights, use_features
from otter_openclip.frozen.prefix import find_prefixes, install, no_prefix_message
from otter_openclip.preprocessing import reference_transforms
from otter_openclip.teacher import EmaTeacher
from otter_openclip.training import flags, order, watch
from otter_openclip.training.closed_form_start import start_from_fit
from otter_openclip.training.ending import Ending, Steps, goes_on_from
from otter_openclip.training.fixed_teacher import FixedTeacher
from otter_openclip.training.objectives import Objective
from otter_openclip.training.resume import Resume, plugin_entries, read_resumed, tell_changes
from otter_openclip.training.scale import add_scale
from otter_openclip.training.student_with_teacher import (
    MovingAverage,
    StudentWithTeacher,
    Teacher,
    locked_batch_norms,
)
from otter_openclip.training.table_check import check_tables
from otter_openclip.training.zeroshot import BestCheckpoint, ZeroShotEvaluation, due

Data = dict[str, Any]  # open_clip's, by name of the data set
_LONGEST = 1000  # characters of a message; torch's of weights that do not fit list every key
_FAULTS_IN_ONE_LINE = ("setup_model", "load_checkpoint", "setup_data", "setup_optimizer")
# Entry of the data dict that stands for --zeroshot-data.
ZEROSHOT_DATA = "zeroshot-data"


def _leave_locked(**_: Any) -> None:
    """In place of ``lock_image_tower``, once ``watch.check_locks`` has locked it.

    With ``--lock-image-freeze-bn-stats`` open_clip puts a plain frozen module in the place of each batch
    norm. That drops the activation of timm's BatchNormAct2d (EfficientNet's outputs are off by orders of
    magnitude) and a counter: the checkpoint no longer fits its own model. Eval mode gives what is meant.
    """


class Plugin:
    """The hooks of one run: ``ClipPlugin``'s where training is open_clip's own, else its subclass's."""

    def __init__(self, prog: str | None = None) -> None:
        """``prog`` is the command's name in messages, by default the one it was called by."""
        self._prog = prog
        self.hooks: ClipPlugin | None = None

    def parse_args(self, parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
        """Arguments: ``parser``, open_clip_train's, also gets the plugin's flags."""
        parser.prog = self._prog or parser.prog
        args = flags.parse(parser, argv)
        stock = args.loss == "clip" and not args.ema_decay
        self.hooks = (ClipPlugin if stock else TrainingPlugin)(args, parser.prog)
        if args.init is not None:
            self.hooks.faults_named()(start_from_fit)(args)
        return args

    def __getattr__(self, name: str) -> Any:
        """A hook; a fault of what the first of them read ends the command with one line."""
        hook = getattr(self.hooks, name)
        return self.hooks.faults_named()(hook) if name in _FAULTS_IN_ONE_LINE else hook


class ClipPlugin:
    """``--loss clip``: what this package has for open_clip's own training.

    That is ``--reference-crop``, ``--feature-cache`` and ``--zeroshot-data``. The other hooks are the
    steps of open_clip's own.
    """

    def __init__(self, args: Namespace, prog: str) -> None:
        self.args, self._prog = args, prog
        self.model: nn.Module | None = None
        self.optimizer_and_scaler: tuple[Optimizer, Any] | None = None
        self.teacher: Teacher | None = None
        self._train_data: DataInfo | None = None
        self._zeroshot: ZeroShotEvaluation | None = None
        self._best: BestCheckpoint | None = None
        self._there_before = set(Path(args.logs, args.name).glob("*")) if args.name else set()

    def refuse(self, fault: Any, error: Exception | None = None) -> NoReturn:
        """End the command with one line, however many torch or transformers needs."""
        if self.optimizer_and_scaler is None:
            self.drop_folder()
        text = textwrap.shorten(str(fault), _LONGEST, placeholder=" ...")
        raise SystemExit(f"{self._prog}: error: {text}") from error

    @contextlib.contextmanager
    def faults_named(self) -> Iterator[None]:
        """A fault of the input ends the command with one line."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.refuse(error, error)

    def setup_model(self, args: Namespace, model: nn.Module, *transforms: Any) -> tuple[Any, ...]:
        """Model: its transforms under ``--reference-crop`` and of a frozen image tower."""
        self.model = model
        watch.check_loggers_installed(args)
        watch.check_locks(args, model)
        training, evaluation = transforms
        if args.reference_crop:
            training, evaluation = reference_transforms(model.visual.preprocess_cfg)
        if args.lock_image and (args.feature_cache or args.loss != "clip"):
            if args.lock_image_freeze_bn_stats:
                model.lock_image_tower = _leave_locked
            if not args.lock_image_unlocked_groups and not args.aug_cfg:
                training = evaluation
                logging.info("Frozen image tower: images without augmentation; --aug-cfg adds it")
        return model, training, evaluation

    def load_checkpoint(self, path: str) -> Any:
        """Checkpoint load, without running any of its code."""
        checkpoint = read_resumed(path, self.model)
        if self.args.train_data and ENTRY in checkpoint:
            tell_changes(self.args, checkpoint[ENTRY], None)
        return checkpoint

    def setup_data(self, args: Namespace, data: Data, preprocess_val: Any) -> Data:
        """Data: features in their place, ``--zeroshot-data``, and an end where there is no batch."""
        self._train_data = data.get("train")
        check_tables(args, data)
        watch.check_validation(args)
        if self._train_data is not None:
            watch.settle_warmup(args, self._train_data)
            if args.feature_cache is not None:
                for tower, locked in (("visual", args.lock_image), ("text", args.lock_text)):
                    if locked and tower not in self.prefixes:
                        raise ValueError(no_prefix_message(self.model, tower))
                use_features(args, self._train_data, self.model, self.prefixes, preprocess_val)
            if args.pair_weights is not None:
                add_weights(args, self._train_data, weights_of(args.pair_weights))
            watch.watch_passes(args, self._train_data)
        if args.zeroshot_data is not None:
            self._zeroshot = ZeroShotEvaluation(args.zeroshot_data, preprocess_val)
            data[ZEROSHOT_DATA] = self._zeroshot
        if is_master(args):
            prompts = {} if self._zeroshot is None else self._zeroshot.class_prompts()
            watch.tell_cut_texts(args, self._train_data, prompts)
        return data

    @functools.cached_property
    def prefixes(self) -> dict[str, str]:
        """The frozen prefixes of the model, which from the first look on takes their output too."""
        prefixes = find_prefixes(self.model)
        install(self.model, prefixes)
        return prefixes

    def create_loss(self, args: Namespace) -> Callable[..., dict[str, Tensor]]:
        """Make the loss; called as ``loss(**model_out, output_dict=True)``, it gives a dict of terms."""
        return open_clip.create_loss(args)

    def wrap_model(self, args: Namespace, model: nn.Module) -> nn.Module:
        """Wrap the model for the training loop; evaluation and checkpoints keep the one passed in."""
        return model

    def setup_optimizer(self, args: Namespace, optimizer: Optimizer, scaler: Any) -> None:
        """Optimizer; the last moment before work begins, for what ``--zeroshot-data`` would cost."""
        self.optimizer_and_scaler = (optimizer, scaler)
        if self._zeroshot is not None and is_master(args):
            self._zeroshot.read_ahead(self.model, args)
            if args.save_logs:
                self._best = BestCheckpoint(args, self._zeroshot)

    def start_epoch(self, args: Namespace, epoch: int) -> None:
        """Called before each epoch of training."""

    def drop_folder(self) -> None:
        """Without a step the run's folder is as it was, or not there."""
        if getattr(self.args, "log_path", None) is None or not is_master(self.args):
            return
        folder = Path(self.args.logs, self.args.name)
        with contextlib.suppress(OSError):
            for path in set(folder.glob("*")) - self._there_before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            folder.rmdir()

    def evaluate(
        self, args: Namespace, model: nn.Module, epoch: int, tokenizer: Any
    ) -> dict[str, float]:
        """Evaluation: metrics of ``--zeroshot-data`` to add to open_clip's; keeps ``best.pt``."""
        if self._zeroshot is None or (args.train_data and not due(epoch, args)):
            return {}
        judged = self.teacher.module if args.zeroshot_weights == "teacher" else model
        try:
            metrics = self._zeroshot.metrics(judged, tokenizer, epoch, args)
        except (ValueError, OSError, RuntimeError) as error:  # the last: a loader's process died
            if self.optimizer_and_scaler is None:  # nothing but this evaluation was asked for
                self.refuse(f"--zeroshot-data: {error}", error)
            logging.error(f"--zeroshot-data is not evaluated after epoch {epoch}: {error}")
            return {}
        if self._best is not None:

            def make() -> dict[str, Any]:
                return self.with_plugin_entries(self.make_checkpoint(args, model, epoch))

            self._best.offer(metrics, args.zeroshot_weights, make)
        return metrics

    def make_checkpoint(self, args: Namespace, model: nn.Module, epoch: int) -> dict[str, Any]:
        """What open_clip's ``main`` saves after an epoch."""
        optimizer, scaler = self.optimizer_and_scaler
        state = {
            "epoch": epoch,
            "name": args.name,
            "state_dict": getattr(model, "_orig_mod", model).state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        return state if scaler is None else {**state, "scaler": scaler.state_dict()}

    def with_plugin_entries(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What open_clip saves after an epoch, and the plugin's part."""
        return checkpoint

    def save_checkpoint(self, checkpoint: Any, path: str | os.PathLike[str]) -> None:
        """Checkpoint save: with the plugin's part, whole or not at all."""
        try:
            write_file(path, self.with_plugin_entries(checkpoint))
        except OSError as error:
            epoch, then = checkpoint["epoch"], goes_on_from(self.args)
            fault = f"{path} cannot be written ({error}), so epoch {epoch} is lost"
            self.refuse(f"{fault}; make room, then {then}", error)

    def close(self) -> None:
        """After the run, however it ended: no process of its loader is left."""
        if self._train_data is None or self._train_data.shared_epoch is None:
            return
        loader = self._train_data.dataloader.pipeline[0]
        if (iterator := getattr(loader, "_iterator", None)) is not None:
            with contextlib.suppress(RuntimeError):  # one of them was killed
                iterator._shutdown_workers()


class TrainingPlugin(ClipPlugin):
    """The losses of this package, or an EMA beside ``--loss clip``: exact data order and resume.

    Attributes:
        objective: the loss, its scale and what is logged of it.
        resume: what a checkpoint had, until there is an optimizer.
        ending: SIGTERM.
    """

    def __init__(self, args: Namespace, prog: str) -> None:
        super().__init__(args, prog)
        self.resume, self.ending = Resume(args), Ending(args)
        self.objective: Objective | None = None
        self._student: nn.Module | None = None
        self._wrapper: StudentWithTeacher | None = None

    def setup_model(self, args: Namespace, model: nn.Module, *transforms: Any) -> tuple[Any, ...]:
        """Model: the run's folder is claimed; the fixed teacher beside it; ``--init-logit-scale``."""
        for part in ("logit_bias", "text_decoder"):  # of SigLIP and CoCa
            if args.loss != "clip" and getattr(model, part, None) is not None:
                self.refuse(
                    f"--model {args.model} has a {part}, which --loss {args.loss} cannot use"
                )
        self.resume.begin(args)
        if args.teacher_model is not None:
            self.teacher = FixedTeacher(args, model)
        if args.init_logit_scale is not None:
            nn.init.constant_(model.logit_scale, args.init_logit_scale)
        return super().setup_model(args, model, *transforms)

    def load_checkpoint(self, path: str) -> Any:
        """Checkpoint load: the plugin's part of it waits for the optimizer."""
        return self.resume.load(self.args, path, self.model)

    def setup_data(self, args: Namespace, data: Data, preprocess_val: Any) -> Data:
        """Data: every epoch's order follows from (seed, epoch, rank, worker)."""
        order.make_repeatable(data, seed=args.seed, rank=args.rank)
        if "train" in data:
            watch.check_loader(args, data["train"])
        data = super().setup_data(args, data, preprocess_val)
        if "train" in data:
            data["train"].dataloader = Steps(data["train"].dataloader, self.ending, self._check)
        return data

    def create_loss(self, args: Namespace) -> Callable[..., dict[str, Tensor]]:
        """The loss that ``--loss`` names."""
        self.objective = Objective(args)
        return self.objective

    def wrap_model(self, args: Namespace, model: nn.Module) -> nn.Module:
        """Model wrapper: what the loop trains has the teacher's features in its output."""
        self._student = model
        if args.loss == "clip":
            self.teacher = MovingAverage(args, model, {}, eval_mode=True)
            return model
        if args.feature_dropout and not self.prefixes:
            self.refuse(f"--feature-dropout: {no_prefix_message(self.model, 'visual')}")
        if flags.has_ema(args):
            eval_mode = args.teacher_mode == "eval"
            self.teacher = MovingAverage(args, model, self.prefixes, eval_mode=eval_mode)
        elif args.loss in flags.TEACHER_LOSSES and self.teacher is None:
            self.teacher = Teacher(model if args.feature_dropout else None)
        if args.torchcompile and self.teacher is not None and self.teacher.module is not None:
            self.teacher.module.compile()
        locked = args.lock_image and args.lock_image_freeze_bn_stats
        frozen = locked_batch_norms(model) if locked else []
        self._wrapper = StudentWithTeacher(
            model,
            self.teacher,
            accum_freq=args.accum_freq,
            distill_logit_scale=self.objective.scale,
            frozen=[*frozen, *self.prefixes.values()],
            prefixes=self.prefixes,
            feature_dropout=args.feature_dropout,
            weighted=args.pair_weights is not None,
        )
        return self._wrapper

    @property
    def _ema(self) -> EmaTeacher | None:
        return None if self.teacher is None else self.teacher.ema

    def setup_optimizer(self, args: Namespace, optimizer: Optimizer, scaler: Any) -> None:
        """Optimizer: its step moves the EMA teacher, it learns s_d; what a checkpoint had comes back."""
        super().setup_optimizer(args, optimizer, scaler)
        if self._ema is not None:
            optimizer.register_step_post_hook(self._after_step)
        if self.objective.scale is not None:
            add_scale(optimizer, self.objective.scale, args.accum_freq)
        self.resume.restore(args, optimizer, self.objective.scale, self._ema)
        self.ending.listen()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        # A fused optimizer is called for a step that AMP skips too, and told so.
        if not getattr(optimizer, "found_inf", 0.0):
            self._ema.update(self._student)

    def start_epoch(self, args: Namespace, epoch: int) -> None:
        """Epoch: its random numbers follow from (seed, rank, epoch), whatever ran before it."""
        self.ending.leave_if_asked()
        if self._wrapper is not None:
            self._wrapper.start_epoch()
        self.objective.start_epoch(epoch)
        order.seed_process(args.seed, args.rank, epoch)

    def _check(self) -> None:
        """After an epoch's last step, before anything of it is written: nothing is NaN or infinite."""
        self.objective.check()
        watch.check_model("student", unwrap_model(self._student))
        watch.check_model("loss", self.objective.loss)
        if self.teacher is not None and self.teacher.module is not None:
            watch.check_model("teacher", self.teacher.module)

    def with_plugin_entries(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What open_clip saves after an epoch, and the plugin's part."""
        optimizer = self.optimizer_and_scaler[0]
        return checkpoint | plugin_entries(self.args, optimizer, self.objective.scale, self._ema)

    def close(self) -> None:
        """After the run: its loader's processes end, and others may write to its folder."""
        super().close()
        self.resume.end()
