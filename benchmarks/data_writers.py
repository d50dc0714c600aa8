"""What `otter-openclip data csv` is measured against: a process that writes its part of the shards.

Started by `benchmarks.data`. Needs nothing of this package, so that img2dataset may come from an
environment of its own.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path


def parts(args: argparse.Namespace) -> Iterator[tuple[int, list[tuple[str, str, str]]]]:
    """This process's shards: number, and (key, path, caption) of its samples."""
    with open(args.table, encoding="utf-8", newline="") as file:
        rows = enumerate(csv.DictReader(file, delimiter="\t"))
        number = 0
        while part := list(islice(rows, args.shard_size)):
            if number % args.processes == args.process:
                samples = [(f"{n:09d}", row["filepath"], row["title"]) for n, row in part]
                yield number, samples
            number += 1


def write_plain(args: argparse.Namespace, decode: bool) -> None:
    """Read each file, perhaps let Pillow decode it, and write it with webdataset."""
    from PIL import Image

    # Its writer has no use for torch, and importing that takes longer than 1,000 images and 500 MB.
    sys.modules["torch"] = None
    from webdataset import TarWriter

    for number, samples in parts(args):
        with TarWriter(str(args.output / f"{number:05d}.tar")) as writer:
            for key, name, caption in samples:
                content = (args.images / name).read_bytes()
                if decode:
                    with Image.open(io.BytesIO(content)) as image:
                        image.load()
                writer.write({"__key__": key, "jpg": content, "txt": caption})


def write_img2dataset(args: argparse.Namespace) -> None:
    """Read each file and let img2dataset decode, check and write it.

    Its resizer leaves the pictures as they are, its cheapest setting that decodes.
    """
    import pyarrow
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    resizer = Resizer(
        image_size=256, resize_mode="no", resize_only_if_bigger=True, skip_reencode=True
    )
    texts = ("url", "caption", "key", "status", "error_message")
    sizes = ("width", "height", "original_width", "original_height")
    schema = pyarrow.schema(
        [(name, pyarrow.string()) for name in texts] + [(name, pyarrow.int32()) for name in sizes]
    )
    for number, samples in parts(args):
        writer = WebDatasetSampleWriter(number, str(args.output), True, 5, schema, "jpg")
        for key, name, caption in samples:
            content, *found, error = resizer(io.BytesIO((args.images / name).read_bytes()))
            if error is not None:
                raise ValueError(f"{name}: {error}")
            about = dict(zip(texts, (name, caption, key, "success", None), strict=True))
            writer.write(content, key, caption, about | dict(zip(sizes, found, strict=True)))
        writer.close()


WRITERS = {
    "decode": lambda args: write_plain(args, decode=True),
    "copy": lambda args: write_plain(args, decode=False),
    "img2dataset": write_img2dataset,
}


def main() -> None:
    """Write this process's shards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("writer", choices=WRITERS)
    parser.add_argument("--table", required=True, type=Path)
    parser.add_argument("--images", required=True, type=Path, help="folder")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--shard-size", required=True, type=int)
    parser.add_argument("--process", required=True, type=int, help="this one's number")
    parser.add_argument("--processes", required=True, type=int, help="how many share the work")
    args = parser.parse_args()
    WRITERS[args.writer](args)


if __name__ == "__main__":
    main()
