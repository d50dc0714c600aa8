"""What the builders of training sets share: image-caption pairs to shards with ``sizes.json``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from otter_openclip.cli import number
from otter_openclip.data.building import Build, add_output
from otter_openclip.data.lookup import Downloaded, Paths
from otter_openclip.data.plan import Plan
from otter_openclip.data.sources import PATHS, absolute
from otter_openclip.files import write_json
from otter_openclip.shards.write import SIZES_FILE


def add_image_options(parser: argparse.ArgumentParser, images: str, *, required: bool) -> None:
    """Add --images and --img2dataset, one of which must be given if ``required``."""
    add = parser.add_mutually_exclusive_group(required=required).add_argument
    add("--images", help=images, **PATHS)
    text = "img2dataset's output folder or tars, of --output_format webdataset or files"
    add("--img2dataset", help=text, **PATHS)


def add_pair_output(parser: argparse.ArgumentParser) -> None:
    """Add the options of the shard writer, with those of the samples' order."""
    add_output(parser, shard_size=10_000)
    add = parser.add_argument_group("order").add_argument
    text = "shuffles the pairs before they are cut; default 0"
    add("--seed", type=number(0, kind=int), default=0, metavar="N", help=text)
    text = "leave out the pairs that otter-openclip fit found to look wrong: its fit.json"
    add("--drop-wrong", type=absolute, metavar="FILE", help=text)
    text = "keep the input's order (archives on a slow disk are then read from front to back)"
    add("--no-shuffle", action="store_true", help=text)


def images(args: argparse.Namespace, *, any_suffix: bool = False) -> Paths | Downloaded:
    """The pictures of --images or --img2dataset."""
    if args.img2dataset:
        return Downloaded(args.img2dataset)
    return Paths(args.images, any_suffix=any_suffix)


def build(
    args: argparse.Namespace,
    inputs: Sequence[str],
    images: Paths | Downloaded | None,
    fill: Callable[[Plan], None],
    record: str,
    finish: Callable[[Path, Plan], None] | None = None,
) -> int:
    """Build a training set; returns the exit code. The arguments are those of `building.Build`."""

    def write_small_files(folder: Path, plan: Plan) -> None:
        if finish:
            finish(folder, plan)
        sizes = {name: samples for name, samples, _ in plan.report()["written"]}
        write_json(folder / SIZES_FILE, sizes)

    kind = {"suffix": "txt", "encode": str.encode, "shard_name": "{:05d}.tar", "record": record}
    job = Build(args, inputs, images, fill, finish=write_small_files, **kind)
    last = job.run()["shards"] - 1
    print(f"--train-data '{job.output}/{f'{{00000..{last:05d}}}' if last else '00000'}.tar'")
    return 0
