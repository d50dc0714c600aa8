"""What `otter-openclip data csv` is measured against: a process that writes its part of the shards.

Started by `benchmarks.data`.
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


def main() -> None:
    """Write this process's shards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("writer", choices=("decode", "copy"))
    parser.add_argument("--table", required=True, type=Path)
    parser.add_argument("--images", required=True, type=Path, help="folder")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--shard-size", required=True, type=int)
    parser.add_argument("--process", required=True, type=int, help="this one's number")
    parser.add_argument("--processes", required=True, type=int, help="how many share the work")
    args = parser.parse_args()
    write_plain(args, args.writer == "decode")


if __name__ == "__main__":
    main()
