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
from clip_benchmark.datasets.builder import build_wds_dataset
from torch import nn

from otter_openclip.evaluation import run
from otter_openclip.evaluation.labelled_images import is_multilabel
from otter_openclip.evaluation.validator import check_webdataset


class NamedDataset:
    """The webdataset of a name, as ``otter-openclip data`` builds it."""

    default_task = "zeroshot_multilabel"
    batched = True

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *, root: str, split: str, transform: Any, **options: Any) -> Any:
        """Open it."""
        root = run.named_root(self.name, root, split)
        return build_wds_dataset(self.name, transform, split, root, options["wds_cache_dir"])


class MultiLabelTask:
    """F@K and mean average precision, for any number of classes."""

    use_classnames_and_templates = True
    distributed = True
    add_arguments = staticmethod(run.add_arguments)

    def __init__(self) -> None:
        self._files = contextlib.ExitStack()

    def prepare(self, args: argparse.Namespace) -> None:
        """Read ``--templates``; meet the other processes."""
        self._files.enter_context(run.templates_given(args))
        if args.distributed and not dist.is_initialized() and run.join_ranks()[1] > 1:
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
        root, split, _ = dataset.pipeline[0].urls[0].rsplit("/", 2)
        if "://" not in root:
            own_names, own_templates = not args.custom_classname_file, not args.custom_template_file
            check_webdataset(root, split, names=own_names, templates=own_templates)
        together = args.distributed and dist.is_initialized()
        metrics = run.evaluate(model, dataset, transform, tokenizer, args, together=together)
        if not args.dump_templates:  # the one thing of ours that the result then says
            prompts, crop = run.how_measured(args, dataset).values()
            args.dump_templates = True
            dataset.templates = f"{prompts}; reference crop" if crop else prompts
        if together:
            dist.barrier()  # nobody leaves while another still listens
        return metrics


goi = NamedDataset("goi")
imagenet10k = NamedDataset("imagenet10k")
zeroshot_multilabel = MultiLabelTask()
