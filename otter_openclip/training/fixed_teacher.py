"""The fixed teacher of ``--distill-model``: it must read what the student reads.

open_clip gives both models the student's images and tokens, whatever the teacher was trained on.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import open_clip
from torch import Tensor, nn

from otter_openclip.training.student_with_teacher import as_teacher

# Letter case, accents, punctuation, numbers, other scripts; the last is cut off by any context.
_PROBES = (
    "a photo of two dogs, running",
    "A Photo of TWO dogs",
    "café déjà-vu: it's 12.5 % off!",
    "猫の写真 и кошка 🐈",
    "   spaces\tand\nlines  ",
    "",
    "word " * 500,
)
_IMAGE = (
    ("size", "image size", "--force-image-size"),
    ("mean", "image mean", "--image-mean"),
    ("std", "image std", "--image-std"),
)


def create(args: Namespace, student: nn.Module) -> nn.Module:
    """The model of ``--distill-model``.

    Raises:
        ValueError: if its image size, mean, std, context length or tokenizer are not the student's.
    """
    teacher, _, _ = open_clip.create_model_and_transforms(
        args.teacher_model,
        args.teacher_pretrained,
        device=args.device,
        precision=args.precision,
        output_dict=True,
        cache_dir=args.cache_dir,
    )
    if message := _misfit(args, student, teacher):
        raise ValueError(
            f"--distill-model {args.teacher_model} would be given the student's input, but {message}"
        )
    return as_teacher(teacher)


def _misfit(args: Namespace, student: nn.Module, teacher: nn.Module) -> str | None:
    for key, name, flag in _IMAGE:
        theirs, ours = (_pair(model.visual.preprocess_cfg[key]) for model in (teacher, student))
        if theirs != ours:
            return f"its {name} is {theirs}, the student's {ours}; pass {flag}, or another teacher"
    try:
        theirs = open_clip.get_tokenizer(args.teacher_model, cache_dir=args.cache_dir)
    except OSError as error:  # offline, a tokenizer that is not in the hub's cache
        logging.warning(
            f"--distill-model {args.teacher_model}: its tokenizer cannot be loaded, so it is not known "
            f"whether it is the student's: {error}"
        )
        return None
    ours = open_clip.get_tokenizer(
        args.model, cache_dir=args.cache_dir, context_length=args.force_context_length
    )
    return _token_misfit(theirs, ours)


def _token_misfit(theirs: Callable[..., Tensor], ours: Callable[..., Tensor]) -> str | None:
    for probe in _PROBES:
        mine, yours = ours([probe])[0].tolist(), theirs([probe])[0].tolist()
        if len(mine) != len(yours):
            return (
                f"its context length is {len(yours)}, the student's {len(mine)}; pass "
                "--force-context-length, or another teacher"
            )
        if mine != yours:
            shown = probe if len(probe) < 40 else f"{probe[:40]}..."
            return (
                f"its tokenizer makes {_without_padding(yours)} of {shown!r}, the student's "
                f"{_without_padding(mine)}; choose a teacher with the student's tokenizer"
            )
    return None


def _without_padding(tokens: list[int], most: int = 12) -> str:
    while len(tokens) > 1 and tokens[-1] == tokens[-2]:
        tokens = tokens[:-1]
    return f"{tokens[:most]}{'...' if len(tokens) > most else ''}"


def _pair(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value, value)
