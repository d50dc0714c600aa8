"""Images with JSON beside them, in tars; and parquet and arrow tables made into such tars.

A table's images lie in a column of bytes (img2dataset) or of {bytes, path} (Hugging Face datasets).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from otter_openclip.data import sources


class Sample(NamedTuple):
    """A sample's name, its JSON and its image's file, each None if it is not there."""

    name: str
    metadata: bytes | None
    file: list[Any] | None


def samples(tar: str) -> Iterator[Sample]:
    """The samples of an uncompressed tar or a zip in their order."""
    stem, metadata, file = "", None, None
    with open(tar, "rb") as opened:
        for member in sources.members(tar):
            name, suffix = os.path.splitext(member.name)
            if name != stem:
                if metadata or file:
                    yield Sample(stem, metadata, file)
                stem, metadata, file = name, None, None
            if suffix == ".json":
                metadata = os.pread(opened.fileno(), member.size, member.offset)
            elif suffix != ".txt":
                file = [tar, *member[1:]]
    if metadata or file:
        yield Sample(stem, metadata, file)


def write_tar(table: IO[bytes], out: IO[bytes], name: str) -> None:
    """Write the rows of the parquet or arrow ``table`` called ``name`` as a tar of images and JSON.

    Raises:
        ValueError: if the table has not one column of images.
        OSError: if it is damaged, or pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        fix = "pip install 'otter-openclip[parquet]'"
        raise OSError(f"{name}: pyarrow, which reads it, is not installed; {fix}") from error
    from webdataset import TarWriter

    number = 0
    try:
        if name.endswith(".parquet"):
            reader = parquet.ParquetFile(table)
            schema, batches = reader.schema_arrow, reader.iter_batches(batch_size=64)
        else:
            batches = ipc.open_stream(table)
            schema = batches.schema
        column = image_column(schema, name)
        batches = tqdm(batches, f"Unpacking {os.path.basename(name)}", unit="batch")
        with TarWriter(out, encoder=False, mtime=0) as tar:
            for row in (row for batch in batches for row in batch.to_pylist()):
                image = row.pop(column)
                if isinstance(image, dict):
                    row["image_path"], image = image.get("path"), image.get("bytes")
                text = json.dumps(row, default=str).encode()
                tar.write(
                    {"__key__": f"{number:09d}", "json": text} | ({"x": image} if image else {})
                )
                number += 1
    except pyarrow.ArrowException as error:
        raise OSError(f"{name}: damaged or cut short ({error}); download it again") from error


def image_column(schema: Any, name: str) -> str:
    """The column of images of a pyarrow schema.

    Raises:
        ValueError: if there is not one.
    """
    from pyarrow import types

    def holds_bytes(kind: Any) -> bool:
        inner = {field.name: field.type for field in kind} if types.is_struct(kind) else {}
        return any(
            types.is_binary(k) or types.is_large_binary(k) for k in (kind, inner.get("bytes", kind))
        )

    found = [field.name for field in schema if holds_bytes(field.type)]
    if len(found) != 1:
        raise ValueError(f"{name}: {len(found)} columns of images among {', '.join(schema.names)}")
    return found[0]
