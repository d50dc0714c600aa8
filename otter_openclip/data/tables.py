"""Tables of text, read strictly and line by line; an error names the file and the line.

The csv module in strict mode, not pandas: ``read_csv`` pads a row that is too short, and knows no lines.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import IO

OPENERS: dict[bytes, Callable] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
# What the decompressors raise on a file that is cut short or broken.
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}
_UNQUOTED = '; a field that begins with " ends with one, and those inside are doubled: "say ""a"""'
csv.field_size_limit(1 << 27)


def open_bytes(path: str) -> IO[bytes]:
    """Open a file, or what fsspec finds at an address (s3://, hf://, https://)."""
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return io.BufferedReader(fsspec.open(path, "rb").open())


def opener(file: IO[bytes]) -> Callable | None:
    """The ``open`` of the module that unpacks what is in ``file``, by its first bytes."""
    magic = file.peek(6)[:6]  # type: ignore[attr-defined]
    return next((opener for start, opener in OPENERS.items() if magic.startswith(start)), None)


def lines(path: str, *, ends: bool = False) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of UTF-8 text, compressed or not, with or without byte-order mark.

    Lines end at \\n or \\r\\n only; with ``ends`` they keep them.

    Raises:
        ValueError: naming the line, if it is not UTF-8.
        OSError: if a compressed file is damaged.
    """
    with open_bytes(str(path)) as packed:
        unpack = opener(packed)
        file = packed if unpack is None else unpack(packed)
        number = 0
        try:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, line if ends else line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            where = f"byte {error.start + 1} of the line is {error.object[error.start]:#x}"
            raise ValueError(
                f"{path}:{number}: not UTF-8 text ({where}); "
                "convert the file, e.g. iconv -f latin1 -t utf-8"
            ) from error
        except DAMAGED as error:
            raise OSError(f"{path}: damaged or cut short ({error}); download it again") from error


def rows(path: str, separator: str, *, quotes: bool = True) -> Iterator[tuple[int, list[str]]]:
    """(line number where it starts, fields) of each row; empty lines are passed over.

    Fields may be quoted as in RFC 4180, unless ``quotes`` is false: then a quotation mark is only that.

    Raises:
        ValueError: naming the line, if it is not UTF-8 or a quote does not close.
        OSError: if a compressed file is damaged.
    """
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    texts = (line for _, line in lines(path, ends=True))
    reader = csv.reader(texts, delimiter=separator, strict=True, quoting=quoting)
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "new-line" in str(error):
                fault, fix = "a carriage return inside a line", "; lines end at \\n or \\r\\n"
            else:
                fault, fix = str(error), _UNQUOTED
            raise ValueError(f"{path}:{start}: {fault}{fix}") from error
        if row:
            yield start, row


def header(path: str, columns: Sequence[str] = ()) -> tuple[str, list[str]]:
    """The separator of a table, and its first row's fields.

    It is the tab, comma or semicolon that makes most of ``columns`` fields, then most fields.

    Raises:
        ValueError: if the table is empty, or its first line cannot be parsed.
    """
    line = next((line for _, line in lines(path) if line.strip()), None)
    if line is None:
        raise ValueError(f"{path} is empty; a table with a header is needed")
    found = {}
    for separator in _SEPARATORS:
        with contextlib.suppress(csv.Error):
            found[separator] = next(csv.reader([line], delimiter=separator, strict=True))
    if not found:
        next(rows(path, ","))  # raises
    best = max(found, key=lambda s: (len(set(columns) & set(found[s])), len(found[s])))
    return best, found[best]


def table(
    path: str, columns: Sequence[str], separator: str | None = None, *, quotes: bool = True
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line number, fields of ``columns``) of each row of a table with a header, in any order.

    Without ``separator`` it is found out from the header, and said.

    Raises:
        ValueError: naming the line: for a missing or repeated column, a row of another width, and as
            `rows` does.
    """
    if separator is None:
        separator, _ = header(path, columns)
    everything = rows(path, separator, quotes=quotes)
    line, names = next(everything, (1, []))
    if not names:
        raise ValueError(f"{path} is empty; a table with a header is needed")
    for name in columns:
        if names.count(name) != 1:
            listed = ", ".join(map(repr, names))
            fault = f"no column {name!r} but {listed}" if name not in names else f"two {name!r}"
            raise ValueError(f"{path}:{line}: has {fault}")
    print(f"{path}: fields separated by {_SEPARATORS.get(separator, repr(separator))}")
    pick = itemgetter(*map(names.index, columns), 0)  # with one more it gives a tuple
    return _of_width(everything, len(names), pick, path)


def _of_width(
    everything: Iterator[tuple[int, list[str]]], width: int, pick: Callable, path: str
) -> Iterator[tuple[int, tuple[str, ...]]]:
    for number, row in everything:
        if len(row) != width:
            raise ValueError(f"{path}:{number}: {len(row)} fields, the header has {width}")
        yield number, pick(row)[:-1]
