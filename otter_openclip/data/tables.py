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

_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}
_QUOTES = 'a field that begins with " ends with one, and those inside are doubled: "say ""a"""'
csv.field_size_limit(1 << 27)


def open_bytes(path: str) -> IO[bytes]:
    """Open a file, or what fsspec finds at an address (s3://, hf://, https://)."""
    if "://" not in str(path):
        return open(path, "rb")
    import fsspec

    return io.BufferedReader(fsspec.open(path, "rb").open())


def opener(file: IO[bytes]) -> Callable | None:
    """What unpacks ``file``, by its first bytes; None if it is not compressed."""
    start = file.peek(6)  # type: ignore[attr-defined]
    return next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)


@contextlib.contextmanager
def damage_named(path: str) -> Iterator[None]:
    """What unpacking raises for a file that is cut short or broken as an OSError that names it."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        of_bz2 = str(error) == "Invalid data stream"  # which has no type of its own for it
        if isinstance(error, OSError) and not (of_bz2 or isinstance(error, gzip.BadGzipFile)):
            raise
        raise OSError(f"{path}: damaged or cut short ({error}); download it again") from error


def lines(path: str, *, ends: bool = False) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of UTF-8 text, compressed or not; only \\n and \\r\\n end lines.

    They are cut off, unless ``ends``, and so is a byte-order mark.

    Raises:
        ValueError: naming the line, if it is not UTF-8.
        OSError: if a compressed file is damaged.
    """
    with open_bytes(path) as packed, damage_named(path):
        file, number = (opener(packed) or (lambda file: file))(packed), 0
        try:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, line if ends else line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            fault = f"not UTF-8 text (byte {error.start + 1} is {error.object[error.start]:#x})"
            fix = "convert the file, e.g. iconv -f latin1 -t utf-8"
            raise ValueError(f"{path}:{number}: {fault}; {fix}") from error


def rows(path: str, separator: str, *, quotes: bool = True) -> Iterator[tuple[int, list[str]]]:
    """(line where it starts, fields) of each row that is not empty; RFC 4180's quoting if ``quotes``.

    Raises:
        ValueError: naming the line, if a quote does not close; and as `lines` does.
    """
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    texts = (line for _, line in lines(path, ends=True))
    reader = csv.reader(texts, delimiter=separator, strict=True, quoting=quoting)
    start = 1
    try:
        for row in reader:
            if row:
                yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        fault = f"{error}; {_QUOTES}"
        if "new-line" in str(error):
            fault = "a carriage return inside a line; lines end at \\n or \\r\\n"
        raise ValueError(f"{path}:{start}: {fault}") from error


def header(path: str, columns: Sequence[str]) -> tuple[str, list[str]]:
    """The separator and the fields of a table's first line; ValueError if it is empty or no row.

    Of tab, comma and semicolon it is the one that makes most of ``columns`` fields, then most fields.
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
    """(line, fields of ``columns``) of each row of a table with a header, in any order.

    Without ``separator`` it is found out from the header, and said.

    Raises:
        ValueError: naming the line: now for a missing or repeated column, later for a row of another
            width; and as `rows` does.
    """
    separator = separator or header(path, columns)[0]
    everything = rows(path, separator, quotes=quotes)
    line, names = next(everything, (1, []))
    for name in columns:
        if names.count(name) != 1:
            listed = ", ".join(map(repr, names)) or "nothing"
            fault = f"no column {name!r} but {listed}" if name not in names else f"two {name!r}"
            raise ValueError(f"{path}:{line}: has {fault}")
    print(f"{path}: fields separated by {_SEPARATORS.get(separator, repr(separator))}")
    pick = itemgetter(*map(names.index, columns), 0)  # with one more it gives a tuple

    def body() -> Iterator[tuple[int, tuple[str, ...]]]:
        for number, row in everything:
            if len(row) != len(names):
                fault = f"{len(row)} fields, the header has {len(names)}"
                raise ValueError(f"{path}:{number}: {fault}")
            yield number, pick(row)[:-1]

    return body()
