"""The losses as a training task of open_clip 4.x (``open_clip.task``), with its EMA as the teacher."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.task import CLIPTask, TrainingTask, unwrap_model
from torch import Tensor, nn

from otter_openclip.features.prefix import find_prefixes, left_out
from otter_openclip.losses import MAX_LOG_SCALE, DistillationLoss
from otter_openclip.teacher import EmaTeacher
from otter_openclip.training.frozen import keep_in_eval_mode
from otter_openclip.training.objectives import statistics
from otter_openclip.training.wrapper import ScaleGradient, as_teacher

Batch = dict[str, Tensor]
Losses = dict[str, Tensor]


class OtterTask(CLIPTask):
    """A model with one of this package's losses and, for ``DistillationLoss`` and its kind, a teacher.

    The teacher is the task's own EMA (``setup_ema``, ``update_ema``, ``state_dict_ema`` in checkpoints),
    or a fixed model as in ``DistillCLIPTask``, here with gradient accumulation too::

        task = OtterTask(model, loss=OtterLoss()).setup_ema()
        optimizer = torch.optim.AdamW([*task.trainable_module.parameters(), *task.loss.parameters()])
        losses, report = task(batch)
        losses["loss"].backward()
        optimizer.step()
        task.update_ema()
        task.clamp_logit_scale()

    Evaluation, ``get_trainable_module`` and ``state_dict_for_inference`` mean the student. open_clip's
    tasks prefer their EMA there, because it is what they train; here it is what they train from, and
    the paper's results, like the launcher's under open_clip 3.x, are the student's.
    """

    def __init__(
        self, model: nn.Module, *, loss: nn.Module, teacher: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Put the parts together.

        Args:
            model: the student, made with ``output_dict=True``.
            loss: ``DistillationLoss``, ``OtterLoss``, ``LabelSmoothingLoss`` or ``open_clip.ClipLoss``.
            teacher: a fixed teacher, made with ``output_dict=True``; without one, ``setup_ema`` makes
                the EMA the teacher.
            **kwargs: ``device``, ``dtype`` and ``verbose`` of ``open_clip.task.CLIPTask``.

        Raises:
            ValueError: if there is a teacher and ``loss`` has no use for it.
        """
        super().__init__(model, loss=loss, **kwargs)
        self._needs_teacher = isinstance(loss, DistillationLoss)
        if teacher is not None:
            self._check_takes_teacher()
            teacher.eval()
            as_teacher(teacher)
        self.teacher = teacher
        self.frozen: list[str] = []  # names of modules that are never in train mode
        self._teacher_forward = self._run_teacher
        # While the micro-batches of one batch get their gradients: they, the whole batch's teacher
        # features, and how many are still to come.
        self._batches: list[Batch] | None = None
        self._taught: Batch = {}
        self._to_come = 0

    def _check_takes_teacher(self) -> None:
        if not self._needs_teacher:
            raise ValueError(
                f"{type(self.loss).__name__} has no teacher; use DistillationLoss or OtterLoss"
            )

    def setup_ema(
        self,
        decay: float = 0.999,
        device: torch.device | None = None,
        *,
        eval_mode: bool = False,
    ) -> OtterTask:
        """Make the EMA, which is the teacher.

        Args:
            decay: upper bound of the decay, in [0, 1].
            device: None or the student's, where the teacher runs.
            eval_mode: see :class:`~otter_openclip.EmaTeacher`.

        Raises:
            ValueError: if there is a fixed teacher, the loss has none, or an argument is out of range.
        """
        self._check_takes_teacher()
        if self.teacher is not None:
            raise ValueError("the task has a fixed teacher; make it without one to use the EMA")
        model = unwrap_model(self.trainable_module)
        here = next(model.parameters()).device
        if device is not None and torch.device(device) != here:
            raise ValueError(
                f"the EMA runs as the teacher on the student's device, {here}, not {device}"
            )
        with left_out(model, find_prefixes(model).values()) as copies:
            self.trainable_module_ema = EmaTeacher(model, decay, eval_mode=eval_mode)
            copies.append(as_teacher(self.trainable_module_ema.module))
        return self.train(self.training)

    def prepare_distributed(
        self, device_ids: list[Any] | None = None, **ddp_kwargs: Any
    ) -> OtterTask:
        """Wrap the student in DDP; an EMA without updates is made again, from rank 0's weights."""
        prepare_distributed(self, device_ids, **ddp_kwargs)
        ema = self.trainable_module_ema
        if ema is not None and ema.num_updates == 1:
            self.setup_ema(ema.decay, eval_mode=ema.eval_mode)
        return self

    def compile(
        self,
        *,
        target: str = "task",
        backend: str | None = None,
        mode: str | None = None,
        **compile_kwargs: Any,
    ) -> OtterTask:
        """As in open_clip; ``target="model"`` also compiles the teacher. Losses stay as they are."""
        if target == "model":
            kwargs = self._compile_kwargs(backend, mode, **compile_kwargs)
            self._teacher_forward = torch.compile(self._run_teacher, **kwargs)
        return super().compile(target=target, backend=backend, mode=mode, **compile_kwargs)

    def train(self, mode: bool = True) -> OtterTask:
        """Set the student's mode; the EMA follows unless it runs in eval mode, a fixed teacher never."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        ema = self.trainable_module_ema
        if ema is not None:
            ema.module.train(mode and not ema.eval_mode)
            keep_in_eval_mode(ema.module, self.frozen)
        keep_in_eval_mode(self.trainable_module, self.frozen)
        return self

    def training_forward(self, batch: Batch) -> tuple[Losses, Losses]:
        """Loss terms and their total, with statistics of the targets to log; then the report."""
        output = self.trainable_module(image=batch["image"], text=batch["text"])
        losses = self._compute(**output, **self._teach(batch))
        losses["loss"] = sum(losses.values())
        return losses | statistics(self.loss, output["logit_scale"]), self._report(output)

    def compute_accum_loss(
        self, inputs: Batch, inputs_no_accum: Batch, accum_batches: list[Batch]
    ) -> tuple[Losses, Losses]:
        """The whole batch's loss, for the gradients of one of its micro-batches.

        open_clip's loop calls it once for each micro-batch. The teacher runs over all of them in the
        first call. The loss is differentiated in each call, so what belongs to no micro-batch,
        ``logit_scale``, would get its gradient ``len(accum_batches)`` times; it is divided here.
        """
        count = len(accum_batches)
        if self._batches is not accum_batches:
            taught = [self._teach(batch) for batch in accum_batches]
            self._taught = {key: torch.cat([x[key] for x in taught]) for key in taught[0]}
            self._batches, self._to_come = accum_batches, count
        scale = ScaleGradient.apply(inputs_no_accum["logit_scale"], 1.0 / count)
        inputs_no_accum = inputs_no_accum | {"logit_scale": scale}
        losses = self._compute(**inputs, **inputs_no_accum, **self._taught)
        self._to_come -= 1
        if self._to_come == 0:
            self._batches, self._taught = None, {}
        return losses | statistics(self.loss, scale), self._report(inputs_no_accum)

    @torch.compiler.disable
    def _compute(self, **features: Tensor) -> Losses:
        return self.loss(**features, output_dict=True)

    @torch.no_grad()
    def _teach(self, batch: Batch) -> Batch:
        if not self._needs_teacher:
            return {}
        output = self._teacher_forward(image=batch["image"], text=batch["text"])
        return {f"dist_{name}": output[name] for name in ("image_features", "text_features")}

    def _run_teacher(self, image: Tensor, text: Tensor) -> Batch:
        ema = self.trainable_module_ema
        teacher = self.teacher if ema is None else ema.module
        if teacher is None:
            raise RuntimeError(
                f"{type(self.loss).__name__} needs a teacher: call task.setup_ema(), or pass teacher="
            )
        return teacher(image=image, text=text)

    def clamp_logit_scale(self, max_val: float = MAX_LOG_SCALE) -> None:
        """Clamp the logs of both scales to [0, ``max_val``]."""
        super().clamp_logit_scale(max_val)
        scale = getattr(self.loss, "distill_logit_scale", None)
        if scale is not None:
            with torch.no_grad():
                scale.clamp_(0, max_val)

    def get_trainable_module(self, use_ema: bool = False) -> nn.Module:
        """The bare student, or on request its EMA."""
        return super().get_trainable_module(use_ema=use_ema)

    def eval_forward(self, batch: Batch) -> Batch:
        """The student's output."""
        inputs = {key: batch[key] for key in self.data_keys if key in batch}
        return self.get_trainable_module()(**inputs)

    def state_dict_for_inference(self) -> dict[str, Tensor]:
        """The student's weights."""
        return self.get_trainable_module().state_dict()

    def load_state_dict(
        self, state_dict: dict[str, Any], strict: bool = True, **kwargs: Any
    ) -> None:
        """Load student and EMA; without ``state_dict_ema`` the EMA becomes a copy of the student."""
        super().load_state_dict(state_dict, strict=strict, **kwargs)
        ema = self.trainable_module_ema
        if ema is None:
            return
        if "state_dict_ema" in state_dict:
            ema.set_extra_state({"num_updates": ema.num_updates, "masters": {}})
        else:
            ema.set(self.get_trainable_module())
            ema.set_extra_state({"num_updates": 1, "masters": {}})


_stock_prepare_distributed = TrainingTask.prepare_distributed


def prepare_distributed(
    task: TrainingTask, device_ids: list[Any] | None = None, **ddp_kwargs: Any
) -> TrainingTask:
    """``TrainingTask.prepare_distributed`` without ``device_ids`` on a CPU, where torch refuses them."""
    if all(param.device.type == "cpu" for param in task.trainable_module.parameters()):
        device_ids = None
    return _stock_prepare_distributed(task, device_ids=device_ids, **ddp_kwargs)
