"""The fixed teacher of ``--distill-model``: it must read what the student reads.

open_clip gives both models the student's images and tokens, whatever the teacher was trained on.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import open_clip
from torch import nn

from otter_openclip.cli import USER_ERRORS
from otter_openclip.frozen.loader import student_tokenizer
from otter_openclip.preprocessing import size_pair
from otter_openclip.training.student_with_teacher import Teacher, as_teacher


class FixedTeacher(Teacher):
    """A released model whose features are the targets throughout."""

    shares_prefixes = False

    def __init__(self, args: Namespace, student: nn.Module) -> None:
        """Make the model of ``--distill-model``.

        Raises:
            ValueError: if open_clip cannot make it, or it does not read what the student reads.
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
        except USER_ERRORS as error:
            raise ValueError(f"--distill-model {args.teacher_model}: {error}") from error
        theirs = _inputs(
            model, open_clip.get_tokenizer(args.teacher_model, cache_dir=args.cache_dir)
        )
        ours = _inputs(student, student_tokenizer(args))
        for what, value in theirs.items():
            if value != ours[what]:
                raise ValueError(
                    f"--distill-model {args.teacher_model} would be given the student's input, but its "
                    f"{what} is {value}, the student's {ours[what]}; take another teacher, or its size, "
                    "mean, std and context by --force-image-size, --image-mean, ..."
                )
        self.module = as_teacher(model.eval())


def _inputs(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """What a model with this tokenizer reads."""
    image, inner = model.visual.preprocess_cfg, getattr(tokenizer, "tokenizer", tokenizer)
    return {
        "image size": size_pair(image["size"]),
        "image mean": tuple(image["mean"]),
        "image std": tuple(image["std"]),
        "context length": tokenizer.context_length,
        "tokenizer": f"{type(inner).__name__} of {getattr(inner, 'vocab_size', '?')} words",
    }
