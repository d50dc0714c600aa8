"""Reading metadata files line by line, with errors that name file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# What the decompressors raise on a file that is cut short or broken; bz2 has only OSError for it.
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
csv.field_size_limit(1 << 27)


def open_text(path: Path) -> IO[str]:
    """Open UTF-8 text with or without byte-order mark, compressed or not; ``newline`` is kept."""
    opener = _OPENERS.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8-sig", newline="")  # type: ignore[operator]


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end); lines end at \\n or \\r\\n only.

    Raises:
        ValueError: naming the line, if it is not UTF-8.
        OSError: if a compressed file is damaged.
    """
    opener = _OPENERS.get(path.suffix, open)
    with opener(path, "rb") as file:  # type: ignore[operator]
        for number, raw in enumerate(_undamaged(file, path), 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason})") from error
            yield number, line.rstrip("\r\n")


def csv_rows(path: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """(line number of the row's end, fields) of a CSV file; empty lines are passed over.

    Raises:
        ValueError: naming the line, if it is not UTF-8 or no CSV.
        OSError: if a compressed file is damaged.
    """
    with open_text(path) as file:
        reader = csv.reader(_undamaged(file, path), delimiter=delimiter)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}: not UTF-8 text after line {reader.line_num} ({error.reason})"
                ) from error
            except csv.Error as error:
                raise ValueError(f"{path}:{reader.line_num}: {error}") from error
            if row:
                yield reader.line_num, row


def _undamaged(file: IO[Any], path: Path) -> Iterator[Any]:
    try:
        yield from file
    except DAMAGED as error:
        raise OSError(f"{path}: damaged or cut short ({error}); download it again") from error


def first_line(path: Path) -> str:
    """The first line that is not blank.

    Raises:
        ValueError: if there is none.
    """
    for _, line in lines(path):
        if line.strip():
            return line
    raise ValueError(f"{path}: empty file")
