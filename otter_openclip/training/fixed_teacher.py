"""The fixed teacher of ``--distill-model``: it must read what the student reads.

open_clip gives both models the student's images and tokens, whatever the teacher was trained on.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import open_clip
from torch import nn

from otter_openclip.preprocessing import size_pair
from otter_openclip.training.student_with_teacher import Teacher, as_teacher

_IMAGE = {"size": "--force-image-size", "mean": "--image-mean", "std": "--image-std"}


class FixedTeacher(Teacher):
    """A released model whose features are the targets throughout."""

    shares_prefixes = False

    def __init__(self, args: Namespace, student: nn.Module) -> None:
        """Make the model of ``--distill-model``.

        Raises:
            ValueError: if its image size, mean, std, context length or kind of tokenizer are not the
                student's.
        """
        model, _, _ = open_clip.create_model_and_transforms(
            args.teacher_model,
            args.teacher_pretrained,
            device=args.device,
            precision=args.precision,
            output_dict=True,
            cache_dir=args.cache_dir,
        )
        if misfit := _image_misfit(student, model) or _token_misfit(args):
            raise ValueError(
                f"--distill-model {args.teacher_model} would be given the student's input, but {misfit}"
            )
        self.module = as_teacher(model.eval())


def _image_misfit(student: nn.Module, teacher: nn.Module) -> str | None:
    for key, flag in _IMAGE.items():
        theirs, ours = (
            size_pair(config[key]) if key == "size" else tuple(config[key])
            for config in (teacher.visual.preprocess_cfg, student.visual.preprocess_cfg)
        )
        if theirs != ours:
            return f"its image {key} is {theirs}, the student's {ours}; pass {flag}, or another teacher"
    return None


def _token_misfit(args: Namespace) -> str | None:
    theirs = open_clip.get_tokenizer(args.teacher_model, cache_dir=args.cache_dir)
    ours = open_clip.get_tokenizer(
        args.model, cache_dir=args.cache_dir, context_length=args.force_context_length
    )
    lengths = theirs.context_length, ours.context_length
    if lengths[0] != lengths[1]:
        return (
            f"its context length is {lengths[0]}, the student's {lengths[1]}; pass "
            "--force-context-length, or another teacher"
        )
    kinds = _kind(theirs), _kind(ours)
    if kinds[0] != kinds[1]:
        return (
            f"its tokenizer is {kinds[0]}, the student's {kinds[1]}; choose a teacher with the "
            "student's tokenizer"
        )
    return None


def _kind(tokenizer: Any) -> str:
    """A tokenizer's class and number of words; of Hugging Face's, those of the wrapped one."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    return f"{type(inner).__name__} of {getattr(inner, 'vocab_size', '?')} words"
