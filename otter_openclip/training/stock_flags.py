"""open_clip_train's own flags: values that it takes, and fails on later or passes over in silence."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import open_clip
import timm.optim
import torch
from open_clip.transform import AugmentationCfg

from otter_openclip.cli import as_list, number

_count, _positive = number(0, kind=int), number(1, kind=int)
_share, _above = number(0, 1), number(0, open_low=True)
_SCHEDULES = ("cosine", "const", "const-cooldown")
_OPTIMIZERS = ("adamw", "nadamw") if open_clip.__version__ >= "4" else ("adamw",)
_REPORTS = ("tensorboard", "wandb", "trackio", "all", "none")


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected a value, got ''")
    return text


def _choice(choices: Iterable[str]) -> Callable[[str], str]:
    choices = list(choices)

    def parse(text: str) -> str:
        if text not in choices:
            near = difflib.get_close_matches(text, choices, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices[:9])}"
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r}; {hint}")
        return text

    return parse


def _optimizer(text: str) -> str:
    name = text.lower()
    if name.startswith("timm/") and hasattr(timm.optim, "list_optimizers"):
        _choice(timm.optim.list_optimizers())(re.sub("^timm/(lookahead_)?", "", name))
    elif not name.startswith("timm/"):
        _choice([*_OPTIMIZERS, "timm/adamw", "timm/sgd", "timm/lamb"])(name)
    return text


def _reports(text: str) -> str:
    for word in re.split("[, ]+", text):
        _choice(_REPORTS)(word)
    return text


def _device(text: str) -> str:
    try:
        torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"no device {text!r}; e.g. cpu, cuda, cuda:1") from None
    return text


CHECKS: dict[str, Callable[[str], Any]] = {
    "--train-num-samples": _positive,
    "--val-num-samples": _positive,
    "--logs": _text,
    "--name": _text,
    "--workers": _count,
    "--batch-size": _positive,
    "--epochs": _positive,
    "--epochs-cooldown": _count,
    "--lr": number(0),
    "--beta1": _share,
    "--beta2": _share,
    "--eps": number(0),
    "--wd": number(0),
    "--momentum": number(0),
    "--warmup": _count,
    "--opt": _optimizer,
    "--lr-scheduler": _choice(_SCHEDULES),
    "--lr-cooldown-end": number(0),
    "--lr-cooldown-power": number(0),
    "--save-frequency": _count,
    "--zeroshot-frequency": _count,
    "--val-frequency": _count,
    "--lock-image-unlocked-groups": _count,
    "--lock-text-unlocked-layers": _count,
    "--image-mean": number(-math.inf),
    "--image-std": _above,
    "--force-context-length": _positive,
    "--force-image-size": _positive,
    "--force-patch-dropout": _share,
    "--accum-freq": _positive,
    "--device": _device,
    "--report-to": _reports,
    "--seed": _count,
    "--grad-clip-norm": _above,
    "--log-every-n-steps": _positive,
    "--remote-sync-frequency": _positive,
}


def fault(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str | None:
    """What is wrong with the stock flags of ``args``, for an error; None if nothing is."""
    for action in parser._actions:
        flag, values = (action.option_strings or [""])[0], getattr(args, action.dest, None)
        if flag not in CHECKS or values is None or values == action.default:
            continue
        for value in as_list(values):
            try:
                CHECKS[flag](str(value))
            except argparse.ArgumentTypeError as error:
                return f"argument {flag}: {error}"
    return _together(args)


def _steps(args: argparse.Namespace, eps: float | None) -> bool:
    """Whether timm's optimizer makes a step with that epsilon: each has its own place to fail."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    name = args.opt.lower().removeprefix("timm/")
    try:
        create = timm.optim.create_optimizer_v2
        create([weight], name, lr=args.lr, weight_decay=args.wd, eps=eps).step()
    except Exception:  # TypeError, mostly; others need a GPU, or a package
        return False
    return True


def _together(args: argparse.Namespace) -> str | None:
    for name in ("mean", "std"):
        if len(getattr(args, f"image_{name}") or [0]) not in (1, 3):
            return f"argument --image-{name}: takes 1 or 3 numbers"
    if len(as_list(args.force_image_size)) > 2:
        return "argument --force-image-size: takes one number, or height and width"
    names = [field.name for field in dataclasses.fields(AugmentationCfg)]
    for name in args.aug_cfg:
        try:
            _choice(names)(name)
        except argparse.ArgumentTypeError as error:
            return f"argument --aug-cfg: {error}"
    if args.train_data_upsampling_factors and not args.dataset_resampled:
        return "--train-data-upsampling-factors needs --dataset-resampled; add it"
    if args.lr_scheduler == "const-cooldown" and args.epochs_cooldown is None:
        return "--lr-scheduler const-cooldown needs --epochs-cooldown N; add it"
    if args.opt.lower().startswith("timm/"):
        if args.lr is None:
            return f"--opt {args.opt} has no learning rate of its own; add --lr"
        if (args.beta1 is None) != (args.beta2 is None):
            return "--beta1 and --beta2 go together with an optimizer of timm; give both or none"
        if args.eps is None and not _steps(args, None) and _steps(args, 1e-8):
            return (
                f"--opt {args.opt} needs --eps, which open_clip leaves open for it; add --eps 1e-8"
            )
    if getattr(args, "trace", False) and args.train_data:
        return "--trace: a traced model cannot be trained; drop it"
    return None
