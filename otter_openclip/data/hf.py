"""A Hugging Face dataset with a column of images and one of captions as training shards.

Takes parquet files as they are on the hub, and the arrow files that datasets' save_to_disk writes or
its cache has. Needs pyarrow.
"""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from otter_openclip.cli import needs
from otter_openclip.data import pairs, tables
from otter_openclip.data.lookup import Picture
from otter_openclip.data.plan import Plan
from otter_openclip.data.sources import File, absolute
from otter_openclip.files import written_whole

_ENDS = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0")  # of parquet, arrow's files and streams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add, kind = parser.add_argument, absolute
    text = "folders with .parquet or .arrow files in them or below, or such files"
    add("--dataset", required=True, nargs="+", type=kind, metavar="PATH", help=text)
    add("--text-key", default="text", metavar="NAME", help="column of captions; default text")
    pairs.add_pair_output(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    files = find_files(args.dataset)

    def fill(plan: Plan) -> None:
        folder, key = plan.folder / "unpacked", args.text_key
        folder.mkdir(exist_ok=True)
        for number, path in enumerate(files):
            images = folder / f"{number}.images"
            with written_whole(images) as out:
                for row, (content, name, values) in enumerate(rows(path)):
                    if key not in values:
                        fault = f"no column {key!r} but {', '.join(values)}"
                        raise ValueError(f"{path}: {fault}; --text-key")
                    file = File(os.path.join(os.path.dirname(path), name)) if name else None
                    if content:
                        file = File(str(images), out.tell(), len(content))
                        out.write(content)
                    for caption in texts(values[key], f"{path} row {row}", key):
                        plan.add(f"{path} row {row}", Picture(file), caption)

    return pairs.build(args, files, None, fill, "row")


def find_files(paths: list[str]) -> list[str]:
    """The tables that ``paths`` are or hold, each once; FileNotFoundError if one has none.

    Not those that only lie there as cache-*: what datasets' map and filter made of the data beside.
    """
    files: list[str] = []
    for path in paths:
        inside = sorted(glob.glob(f"{glob.escape(path)}/**/*", recursive=True))
        inside = [name for name in inside if name.endswith((".parquet", ".arrow"))]
        inside = [name for name in inside if not os.path.basename(name).startswith("cache-")]
        if not inside and not os.path.isfile(path):
            raise FileNotFoundError(f"--dataset {path}: no .parquet or .arrow there")
        files += inside or [path]
    # The hub's cache has a link for each revision of a dataset.
    return list({os.path.realpath(path): path for path in files}.values())


def texts(value: Any, row: str, key: str) -> list[str]:
    """The captions of a row, "" where there is none; ValueError if it holds something else."""
    captions = (value or [None]) if isinstance(value, list) else [value]
    for caption in captions:
        if not isinstance(caption, str | None):
            raise ValueError(f"{row}: no text in {key!r}, but {caption!r}; --text-key")
    return [caption or "" for caption in captions]


def rows(path: str) -> Iterator[tuple[bytes | None, str | None, dict[str, Any]]]:
    """The image, the path it has without bytes, and the other columns of each row of a table.

    The images lie in a column of bytes, or of {bytes, path}. ValueError if there is not one such column,
    or two of one name; OSError if the file is damaged; RuntimeError if pyarrow is missing.
    """
    needs("pyarrow", "parquet")
    import pyarrow
    from pyarrow import ipc, parquet, types

    def is_image(kind: Any) -> bool:
        inner = {field.name: field.type for field in kind} if types.is_struct(kind) else {}
        kind = inner.get("bytes", kind)
        return types.is_binary(kind) or types.is_large_binary(kind)

    with open(path, "rb") as file, tables.whole(path, pyarrow.ArrowException):
        if not path.endswith(".arrow"):
            reader = parquet.ParquetFile(file)
            schema, batches = reader.schema_arrow, reader.iter_batches(batch_size=64)
        elif file.peek(6).startswith(b"ARROW1"):
            reader = ipc.open_file(file)
            schema, batches = reader.schema, map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = ipc.open_stream(file)
            schema = batches.schema
        images = [field.name for field in schema if is_image(field.type)]
        listed = ", ".join(schema.names)
        if len(images) != 1:
            raise ValueError(f"{path}: {len(images)} columns of images among {listed}")
        if len(set(schema.names)) < len(schema):
            raise ValueError(f"{path}: two columns of one name among {listed}; rename one")
        every = (row for batch in batches for row in batch.to_pylist())
        for row in tqdm(every, os.path.basename(path), unit="row"):
            image = row.pop(images[0])
            image = image if isinstance(image, dict) else {"bytes": image}
            yield image.get("bytes"), image.get("path"), row
        file.seek(-8, os.SEEK_END)
        if not file.read().endswith(_ENDS):  # pyarrow takes a stream that stops for one that ends
            raise EOFError("its end is not there")
