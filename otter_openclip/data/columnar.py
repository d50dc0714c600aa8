"""Images with JSON beside them in tars; and parquet and arrow tables, made into such tars.

A table's images lie in a column of bytes (img2dataset) or of {bytes, path} (Hugging Face datasets).
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from otter_openclip.data import sources
from otter_openclip.data.decoding import IMAGE_SUFFIXES


class Sample(NamedTuple):
    """A sample's name, its JSON and its image's file, each None if it is not there."""

    name: str
    metadata: bytes | None = None
    file: list[Any] | None = None


def samples(tar: str) -> Iterator[Sample]:
    """The samples of an uncompressed tar in their order."""
    sample = Sample("")
    for member in sources.members(tar):
        name, suffix = os.path.splitext(member.name)
        if name != sample.name:
            if sample != Sample(sample.name):
                yield sample
            sample = Sample(name)
        file = [tar, *member[1:]]
        if suffix == ".json":
            sample = sample._replace(metadata=sources.read(file))
        elif suffix.lower() in IMAGE_SUFFIXES:
            sample = sample._replace(file=file)
    if sample != Sample(sample.name):
        yield sample


def write_tar(table: IO[bytes], out: IO[bytes], name: str) -> None:
    """Write the rows of the parquet or arrow ``table`` called ``name`` as a tar of images and JSON.

    Raises:
        ValueError: if the table has not one column of images.
        OSError: if it is damaged, or pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import ipc, parquet, types
    except ImportError as error:
        fix = "pip install 'otter-openclip[parquet]'"
        raise OSError(f"{name}: pyarrow, which reads it, is not installed; {fix}") from error

    def is_image(kind: Any) -> bool:
        inner = {field.name: field.type for field in kind} if types.is_struct(kind) else {}
        kind = inner.get("bytes", kind)
        return types.is_binary(kind) or types.is_large_binary(kind)

    try:
        if name.endswith(".parquet"):
            reader = parquet.ParquetFile(table)
            schema, batches = reader.schema_arrow, reader.iter_batches(batch_size=64)
        else:
            batches = ipc.open_stream(table)
            schema = batches.schema
        images = [field.name for field in schema if is_image(field.type)]
        if len(images) != 1:
            listed = ", ".join(schema.names)
            raise ValueError(f"{name}: {len(images)} columns of images among {listed}")
        bar = tqdm(desc=f"Unpacking {os.path.basename(name)}", unit="row")
        with tarfile.open(fileobj=out, mode="w") as tar, bar:
            for row in (row for batch in batches for row in batch.to_pylist()):
                image = row.pop(images[0])
                if isinstance(image, dict):
                    row["image_path"], image = image.get("path"), image.get("bytes")
                parts = {"json": json.dumps(row, default=str).encode()}
                sources.add_sample(tar, f"{bar.n:09d}", parts | ({"jpg": image} if image else {}))
                bar.update()
    except pyarrow.ArrowException as error:
        fault = f"damaged or cut short ({error})"
        raise OSError(f"{name}: {fault}; download it again") from error
