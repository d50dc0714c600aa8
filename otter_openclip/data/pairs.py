"""What the builders of training sets share: image-caption pairs to shards with ``sizes.json``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otter_openclip.data import shards
from otter_openclip.data.options import absolute, add_output, summary

SHARD_SIZE = 10_000
EMPTY_CAPTION = "empty caption"


@dataclass(frozen=True)
class Caption:
    """A caption as the ``txt`` file that open_clip reads."""

    def __call__(self, caption: str) -> tuple[str, bytes]:
        """The suffix and content of a sample's caption file."""
        return "txt", caption.encode()


def add_image_options(parser: argparse.ArgumentParser, images: str, *, required: bool) -> None:
    """Add --images and --img2dataset, one of which must be given if ``required``."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--images", nargs="+", metavar="PATH", help=images)
    group.add_argument(
        "--img2dataset",
        nargs="+",
        metavar="PATH",
        help="img2dataset's output folder or tars (--output_format webdataset or files)",
    )


def add_pair_output(parser: argparse.ArgumentParser) -> None:
    """Add the options of the shard writer, with those of the samples' order."""
    add_output(parser, shard_size=SHARD_SIZE)
    group = parser.add_argument_group("order")
    group.add_argument(
        "--seed", type=int, default=0, help="shuffles the pairs before they are cut; default 0"
    )
    group.add_argument(
        "--no-shuffle",
        action="store_true",
        help="keep the input's order (archives on a slow disk are then read from front to back)",
    )


def build(
    args: argparse.Namespace,
    settings: dict[str, Any],
    inputs: Sequence[Path],
    plan: Callable[[shards.Planner], None],
    finish: Callable[[Path, shards.Result], None] | None = None,
) -> int:
    """Build a training set; returns the command's exit code.

    Args:
        args: the options of this module, and ``command``.
        settings: flag -> value of the command's own options.
        inputs: files the result depends on.
        plan: fills the plan with pairs.
        finish: writes further files when the shards are in place.
    """
    output = Path(os.path.abspath(args.output))
    seed = None if args.no_shuffle else args.seed
    if seed is not None and seed < 0:
        raise ValueError(f"--seed must be at least 0, got {seed}")
    job = shards.Build(
        output=output,
        command=args.command,
        settings={
            **settings,
            "images": _absolute_all(args.images),
            "img2dataset": _absolute_all(args.img2dataset),
            "resize": args.resize,
            "shard-size": args.shard_size,
            "seed": seed,
        },
        inputs=inputs,
        encode=Caption(),
        shard_name="{:05d}.tar",
        shard_size=args.shard_size,
        resize=args.resize,
        seed=seed,
        workers=args.workers,
    )

    def write_rest(folder: Path, result: shards.Result) -> None:
        if finish is not None:
            finish(folder, result)
        shards.write_sizes(folder, result)

    result = shards.run(job, plan, write_rest)
    print(summary(output, result))
    print(f"--train-data '{output}/{shard_pattern(len(result.shards))}'")
    if len(result.shards) < 16:
        print(
            "open_clip needs a shard for each data-loading worker of all GPUs together: "
            f"{len(result.shards)} at most here; a smaller --shard-size gives more."
        )
    return 0


def shard_pattern(count: int) -> str:
    """The braces pattern of ``count`` shards."""
    return "00000.tar" if count == 1 else f"{{00000..{count - 1:05d}}}.tar"


def _absolute_all(paths: Sequence[str] | None) -> list[str] | None:
    return None if paths is None else [str(absolute(path)) for path in paths]
