"""Archives that cannot be read by offset, made into such: fetched, unpacked, tables made into tars."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from otter_openclip.data import sources, tables
from otter_openclip.files import written_whole

_ZSTANDARD = b"\x28\xb5\x2f\xfd"


def local(archive: str, folder: Path) -> str:
    """``archive``, or what can be read by offset made of it in ``folder``.

    OSError if it is damaged or its compression is unknown; and as `write_tar`.
    """
    remote, table = "://" in archive, archive.endswith(sources.TABLES)
    with tables.open_bytes(archive) as file:
        unpack = tables.opener(file)
        if file.peek(4).startswith(_ZSTANDARD):  # type: ignore[attr-defined]
            raise OSError(f"{archive}: Zstandard; decompress it (unzstd) and give the .tar")
        if not (unpack or remote or table):
            return archive
        folder.mkdir(parents=True, exist_ok=True)
        name, suffix = os.path.basename(archive), ".zip" if archive.endswith(".zip") else ".tar"
        target = folder / (sources.digest(f"{archive} {sources.stamp(archive)}").hex() + suffix)
        if target.exists():
            return str(target)
        with tables.whole(archive), written_whole(target) as out:
            if table:
                write_tar(file, out, archive)
            else:
                size = None if remote else os.path.getsize(archive)
                with tqdm.wrapattr(file, "read", size, desc=f"Unpacking {name}") as packed:
                    shutil.copyfileobj(unpack(packed) if unpack else packed, out, 1 << 20)
        return str(target)


def write_tar(table: IO[bytes], out: IO[bytes], name: str) -> None:
    """Write the rows of the parquet or arrow ``table`` called ``name`` as a tar of images and JSON.

    The images lie in a column of bytes (img2dataset) or of {bytes, path} (Hugging Face datasets).
    ValueError if there is not one such column; OSError if the table is damaged, or pyarrow is missing.
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

    with tables.whole(name, pyarrow.ArrowException):
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
        rows = (row for batch in batches for row in batch.to_pylist())
        with tarfile.open(fileobj=out, mode="w") as tar:
            bar = tqdm(rows, f"Unpacking {os.path.basename(name)}", unit="row")
            for number, row in enumerate(bar):
                image = row.pop(images[0])
                if isinstance(image, dict):
                    row["image_path"], image = image.get("path"), image.get("bytes")
                parts = {"json": json.dumps(row, default=str).encode()}
                add_sample(tar, f"{number:09d}", parts | ({"jpg": image} if image else {}))


def add_sample(tar: tarfile.TarFile, key: str, parts: Mapping[str, bytes]) -> None:
    """Write a sample as webdataset's TarWriter does, which takes torch, 2 s and 600 MB, to import."""
    for suffix, content in sorted(parts.items()):
        member = tarfile.TarInfo(f"{key}.{suffix}")  # no owner, no date: the same bytes every time
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
