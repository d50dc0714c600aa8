"""A NaN or an infinity ends the run before it reaches a checkpoint, with the step and the term."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from open_clip_train.data import DataInfo
from torch import Tensor, nn
from webdataset.filters import _to_tuple

_NAMED = 5
_FIX = (
    "nothing was saved of this epoch. Fix: a lower --lr, a longer --warmup or --grad-clip-norm; with "
    "--precision amp or fp16 another precision; then --resume latest goes on from the last checkpoint"
)


class LossWatch:
    """Looks at the terms of every loss of a module, which is called ``accum_freq`` times a step.

    The terms stay on their device until a step that is logged, every ``every`` steps, or the last of the
    epoch's ``steps``. There open_clip waits for the device too; one more transfer tells of all of them.
    """

    def __init__(self, loss: nn.Module, *, accum_freq: int, every: int, steps: int) -> None:
        self.accum_freq, self.every, self.steps = accum_freq, every, steps
        self.keys: deque[list[str]] = deque()  # of the batches since the last look
        self._epoch, self._calls = 0, 0
        self._unseen: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []
        loss.register_forward_hook(self._take, with_kwargs=True)

    def start_epoch(self, epoch: int) -> None:
        """Steps count from 0 again."""
        self._epoch, self._calls = epoch, 0
        self._unseen.clear(), self.keys.clear()

    @torch.no_grad()
    def _take(self, _: nn.Module, __: Any, given: dict[str, Any], terms: dict[str, Tensor]) -> None:
        step, part = divmod(self._calls, self.accum_freq)
        self._calls += 1
        rows = {
            name: value.sum(dim=1, dtype=torch.float32).isfinite()
            for name, value in given.items()
            if isinstance(value, Tensor) and value.ndim == 2
        }
        self._unseen.append((step, {k: v.detach() for k, v in terms.items()}, rows))
        if part == self.accum_freq - 1 and (step % self.every == 0 or step + 1 == self.steps):
            self.check()

    def check(self) -> None:
        """End the run, naming the first bad step, if a loss since the last look is not finite."""
        unseen, self._unseen = self._unseen, []
        values = [value.float() for _, terms, _ in unseen for value in terms.values()]
        if values and not torch.stack(values).isfinite().all():
            _stop(self._message(unseen))
        self.keys.clear()

    def _message(self, unseen: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]]) -> str:
        first = unseen[0][0]
        step, terms, rows = next(
            each for each in unseen if not all(value.isfinite() for value in each[1].values())
        )
        found = ", ".join(f"{k} is {v.item()}" for k, v in terms.items() if not v.isfinite())
        text = f"the loss of step {step} of epoch {self._epoch} (both counted from 0): {found}"
        bad = {name: (~good).nonzero().flatten().tolist() for name, good in rows.items()}
        bad = {name: places for name, places in bad.items() if places}
        if bad:
            counts = [f"{len(p)} of {len(rows[name])} {name}" for name, p in bad.items()]
            text += f"; not finite are {', '.join(counts)}"
            begin = (step - first) * self.accum_freq
            batches = list(self.keys)[begin : begin + self.accum_freq]
            keys = [key for batch in batches for key in batch]
            places = sorted({place for each in bad.values() for place in each})[:_NAMED]
            if places[-1] < len(keys):
                text += f", first of the samples {', '.join(keys[place] for place in places)}"
        return text


def keep_keys(train: DataInfo, watch: LossWatch) -> None:
    """Let ``watch`` know the keys of open_clip's webdataset batches, where these are tuples."""
    if train.shared_epoch is None:
        return
    for stage in train.dataloader.pipeline[0].dataset.pipeline:
        if getattr(stage, "f", None) is _to_tuple and stage.args == ("image", "text"):
            stage.args = (*stage.args, "__key__")
            train.dataloader.pipeline.insert(1, _Keys(watch))


class _Keys:
    """Takes the keys out of batches, in the process that trains."""

    def __init__(self, watch: LossWatch) -> None:
        self.watch = watch

    def __call__(self, batches: Iterable[list[Any]]) -> Iterator[list[Any]]:
        for *batch, keys in batches:
            self.watch.keys.append(keys)
            yield batch


def check_model(what: str, model: nn.Module) -> None:
    """End the run, naming the first of ``model``'s tensors in which there is a NaN or an infinity."""
    check_tensors(what, {**dict(model.named_parameters()), **dict(model.named_buffers())})


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Likewise of what ``optimizer`` remembers."""
    check_tensors(
        "optimizer's state",
        {
            f"{name} of parameter {i}": value
            for i, state in enumerate(optimizer.state.values())
            for name, value in state.items()
            if isinstance(value, Tensor)
        },
    )


def check_tensors(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Likewise of tensors by name; -inf is allowed but in parameters: it masks attention."""
    good = {
        name: (x.isfinite() if isinstance(x, nn.Parameter) else x < torch.inf).all()
        for name, x in tensors.items()
        if x.is_floating_point()
    }
    by_device: dict[torch.device, list[Tensor]] = {}  # torch keeps step counts on the CPU
    for fine in good.values():
        by_device.setdefault(fine.device, []).append(fine)
    if not all(torch.stack(fine).all() for fine in by_device.values()):
        name = next(name for name, fine in good.items() if not fine)
        _stop(f"{name} of the {what} is not finite after the epoch")


def _stop(reason: str) -> NoReturn:
    raise SystemExit(f"error: {reason}; {_FIX}")
