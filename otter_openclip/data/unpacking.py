"""Archives that cannot be read by offset, made into such: fetched, unpacked, tables made into tars."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from otter_openclip.cli import needs
from otter_openclip.data import sources, tables
from otter_openclip.files import written_whole
from otter_openclip.shards.write import write_shard

_ENDS = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0")  # of parquet, arrow's files and streams


def local(archive: str, folder: Path) -> str:
    """``archive``, or what can be read by offset made of it in ``folder``.

    OSError if it is damaged; and as `table_samples`.
    """
    remote, table = "://" in archive, archive.lower().endswith(sources.TABLES)
    with tables.open_bytes(archive) as file:
        unpack = tables.opener(file)
        if not (unpack or remote or table):
            return archive
        folder.mkdir(parents=True, exist_ok=True)
        key = sources.digest(f"{archive} {sources.stamp(archive)}").hex()
        target = folder / f"{key}-{os.path.basename(archive)}"  # the name is in errors
        if target.exists():
            return str(target)
        if table:
            write_shard(target, table_samples(file, archive))
            return str(target)
        with written_whole(target) as out:
            size = None if remote else os.path.getsize(archive)
            title = f"Unpacking {os.path.basename(archive)}"
            bar = tqdm.wrapattr(file, "read", size, desc=title)
            with tables.whole(archive), bar as packed:
                shutil.copyfileobj(unpack(packed) if unpack else packed, out, 1 << 20)
        return str(target)


def table_samples(table: IO[bytes], name: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The rows of the parquet or arrow ``table`` called ``name``, each as an image and JSON.

    The images lie in a column of bytes (img2dataset) or of {bytes, path} (Hugging Face datasets).
    ValueError if there is not one such column, or two of one name; OSError if the table is damaged;
    RuntimeError if pyarrow is missing.
    """
    needs("pyarrow", "parquet")
    import pyarrow
    from pyarrow import ipc, parquet, types

    def is_image(kind: Any) -> bool:
        inner = {field.name: field.type for field in kind} if types.is_struct(kind) else {}
        kind = inner.get("bytes", kind)
        return types.is_binary(kind) or types.is_large_binary(kind)

    with tables.whole(name, pyarrow.ArrowException):
        if name.lower().endswith(".parquet"):
            reader = parquet.ParquetFile(table)
            schema, batches = reader.schema_arrow, reader.iter_batches(batch_size=64)
        elif table.peek(6).startswith(b"ARROW1"):  # type: ignore[attr-defined]
            reader = ipc.open_file(table)
            schema, batches = reader.schema, map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = ipc.open_stream(table)
            schema = batches.schema
        images = [field.name for field in schema if is_image(field.type)]
        listed = ", ".join(schema.names)
        if len(images) != 1:
            raise ValueError(f"{name}: {len(images)} columns of images among {listed}")
        if len(set(schema.names)) < len(schema):
            raise ValueError(f"{name}: two columns of one name among {listed}; rename one")
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(tqdm(rows, f"Unpacking {os.path.basename(name)}", unit="row")):
            image = row.pop(images[0])
            if isinstance(image, dict):
                row["image_path"], image = image.get("path"), image.get("bytes")
            files = {"json": json.dumps(row, default=str).encode()}
            yield f"{number:09d}", files | ({"jpg": image} if image else {})
        table.seek(-8, os.SEEK_END)
        if not table.read().endswith(_ENDS):  # pyarrow takes a stream that stops for one that ends
            raise EOFError("its end is not there")
