"""The fixed teacher of ``--distill-model``: it must read what the student reads.

open_clip gives both models the student's images and tokens, whatever the teacher was trained on.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
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
            ValueError: if open_clip cannot make it, or its image size, mean, std, context length or kind
                of tokenizer are not the student's.
        """
        try:
            model, _, _ = open_clip.create_model_and_transforms(
                args.teacher_model,
                args.teacher_pretrained,
                device=args.device,
                precision=args.precision,
                output_dict=True,
                cache_dir=args.cache_dir,
            )
        except RuntimeError as error:
            raise ValueError(f"--distill-model {args.teacher_model}: {error}") from error
        for what, theirs, ours, fix in _compared(args, model, student):
            if theirs != ours:
                raise ValueError(
                    f"--distill-model {args.teacher_model} would be given the student's input, but its "
                    f"{what} is {theirs}, the student's {ours}; {fix}"
                )
        self.module = as_teacher(model.eval())


def _compared(
    args: Namespace, teacher: nn.Module, student: nn.Module
) -> Iterator[tuple[str, Any, Any, str]]:
    """What must be alike: its name, the teacher's, the student's, and what to do if it is not."""
    for key, flag in _IMAGE.items():
        as_tuple = size_pair if key == "size" else tuple
        theirs, ours = (as_tuple(model.visual.preprocess_cfg[key]) for model in (teacher, student))
        yield f"image {key}", theirs, ours, f"pass {flag}, or another teacher"
    theirs = open_clip.get_tokenizer(args.teacher_model, cache_dir=args.cache_dir)
    ours = open_clip.get_tokenizer(
        args.model, cache_dir=args.cache_dir, context_length=args.force_context_length
    )
    lengths = theirs.context_length, ours.context_length
    yield "context length", *lengths, "pass --force-context-length, or another teacher"
    fix = "choose a teacher with the student's tokenizer"
    yield "tokenizer", _kind(theirs), _kind(ours), fix


def _kind(tokenizer: Any) -> str:
    """A tokenizer's class and number of words; of Hugging Face's, those of the wrapped one."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    return f"{type(inner).__name__} of {getattr(inner, 'vocab_size', '?')} words"
