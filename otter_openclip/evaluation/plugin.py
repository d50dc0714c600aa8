"""What ``patches/clip_benchmark-1.6.2.patch`` finds here by entry points.

The datasets ``goi`` and ``imagenet10k`` and the task ``zeroshot_multilabel``, which is theirs and that
of any multi-label webdataset. clip_benchmark's ``plugins.py`` says what each attribute is for.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
from typing import Any

import torch.distributed as dist
from clip_benchmark.cli import world_info_from_env
from torch import nn

from otter_openclip.evaluation import multilabel, ranks
from otter_openclip.evaluation.arguments import add_arguments, check_arguments
from otter_openclip.evaluation.datasets import open_named, templates_file
from otter_openclip.zeroshot.classifier import read_templates
from otter_openclip.zeroshot.images import MultiLabelImages, is_multilabel


class NamedDataset:
    """The webdataset of a name, as ``otter-openclip data`` builds it."""

    default_task = "zeroshot_multilabel"
    batched = True

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, **arguments: Any) -> Any:
        """Open it, from the arguments of clip_benchmark's ``build_dataset``."""
        return open_named(self.name, **arguments)


class MultiLabelTask:
    """F@K and mean average precision, for any number of classes."""

    use_classnames_and_templates = True
    distributed = True
    add_arguments = staticmethod(add_arguments)

    def __init__(self) -> None:
        self._files = contextlib.ExitStack()

    def prepare(self, args: argparse.Namespace) -> None:
        """Check the flags; meet the other processes."""
        check_arguments(args)
        if args.templates:
            file = templates_file(read_templates(args.templates))
            args.custom_template_file = self._files.enter_context(file)
        if args.distributed and not dist.is_initialized():
            local_rank, rank, world_size = world_info_from_env()
            if world_size > 1:
                ranks.join(local_rank, rank, world_size)
                atexit.register(dist.destroy_process_group)

    def evaluate(
        self,
        *,
        model: nn.Module,
        dataset: Any,
        transform: Any,
        tokenizer: Any,
        args: argparse.Namespace,
        **_: Any,
    ) -> dict[str, float]:
        """Metrics of one run, on every rank."""
        self._files.close()
        if not is_multilabel(dataset):
            raise ValueError(
                f"--task zeroshot_multilabel: {args.dataset} is no multi-label webdataset "
                "(dataset_type.txt says multilabel in one); for single labels take --task "
                "zeroshot_classification"
            )
        if args.reference_crop:
            transform = multilabel.reference_crop(model)
        together = args.distributed and dist.is_initialized()
        metrics = multilabel.evaluate(
            model,
            MultiLabelImages(
                dataset, transform, len(dataset.classes), load_truncated=args.load_truncated
            ),
            tokenizer,
            dataset.classes,
            dataset.templates,
            args,
            device=args.device,
            rank=dist.get_rank() if together else 0,
            world_size=dist.get_world_size() if together else 1,
        )
        if together:
            dist.barrier()  # nobody leaves while another still listens
        return metrics


goi = NamedDataset("goi")
imagenet10k = NamedDataset("imagenet10k")
zeroshot_multilabel = MultiLabelTask()
