"""Tables of text, read strictly and line by line; an error names the file and the line.

The csv module in strict mode, not pandas: ``read_csv`` pads a row that is too short, and knows no lines.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import IO

_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
# What readers raise for a file that is cut short or broken.
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_DAMAGED += (tarfile.TarError, zipfile.BadZipFile)
_RETURN = "a carriage return inside a line; lines end at \\n or \\r\\n"
_QUOTES = 'a field that begins with " ends with one, and those inside are doubled: "say ""a"""'
csv.field_size_limit(1 << 27)


def at(path: str, line: int, fault: str) -> ValueError:
    """The error to raise for a ``fault`` in a line of a file."""
    return ValueError(f"{path}:{line}: {fault}")


@contextlib.contextmanager
def damage_named(path: str, *errors: type[Exception]) -> Iterator[None]:
    """What reading a damaged file raises, and further ``errors``, as an OSError that names ``path``."""
    try:
        yield
    except (*_DAMAGED, OSError, *errors) as error:
        untyped = type(error) is OSError and error.errno is None  # bz2's and pyarrow's
        if not (untyped or isinstance(error, (*_DAMAGED, *errors))):
            raise
        raise OSError(f"{path}: damaged or cut short ({error}); get or write it again") from error


def opener(file: IO[bytes]) -> Callable | None:
    """What unpacks ``file``, by its first bytes; None if it is not compressed."""
    start = file.peek(6)  # type: ignore[attr-defined]
    return next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)


def lines(path: str, *, ends: bool = False) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of UTF-8 text, compressed or not; only \\n and \\r\\n end lines.

    They are cut off, unless ``ends``, and so is a byte-order mark. ValueError names a line that is not
    UTF-8 or, unless ``ends``, has another \\r in it, OSError a compressed file that is damaged.
    """
    with open(path, "rb") as packed, damage_named(path):
        file, number = (opener(packed) or (lambda file: file))(packed), 0
        try:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                line = line if ends else line.rstrip("\r\n")
                if not ends and "\r" in line:
                    raise at(path, number, _RETURN)
                yield number, line
        except UnicodeDecodeError as error:
            fault = f"not UTF-8 text (byte {error.start + 1} is {error.object[error.start]:#x})"
            raise at(path, number, f"{fault}; convert it: iconv -f latin1 -t utf-8") from error


def rows(path: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line where it starts, fields) of each row that is not empty, with RFC 4180's quoting.

    ValueError names the line of a quote that does not close; and as `lines`.
    """
    texts = (line for _, line in lines(path, ends=True))
    reader = csv.reader(texts, delimiter=separator, strict=True)
    start = 1
    try:
        for row in reader:
            if row:
                yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        fault = _RETURN if "new-line" in str(error) else f"{error}; {_QUOTES}"
        raise at(path, start, fault) from error


def separator_of(path: str) -> str:
    """The one of tab, comma and semicolon that a table's first line has most of."""
    _, first = next(lines(path), (1, ""))
    return max("\t,;", key=first.count)


def table(
    path: str, columns: Sequence[str], separator: str = ","
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, fields of ``columns``) of each row of a table with a header, in any order.

    ValueError names the line: now of a missing or repeated column, later of a row of another width; and
    as `rows`.
    """
    everything = rows(path, separator)
    line, names = next(everything, (1, []))
    for name in columns:
        if names.count(name) != 1:
            fault = f"two {name!r}" if name in names else f"no column {name!r}"
            listed = ", ".join(map(repr, names)) or "no header"
            raise at(path, line, f"has {fault} but {listed}, separated by {separator!r}")
    pick = itemgetter(*map(names.index, columns), 0)  # with one more it gives a tuple

    def body() -> Iterator[tuple[int, tuple[str, ...]]]:
        for number, row in everything:
            if len(row) != len(names):
                raise at(path, number, f"{len(row)} fields, the header has {len(names)}")
            breaks = [(text.count("\n"), text.count("\t")) for text in row if "\n" in text]
            if separator == "\t" and any(n * (len(names) - 1) == tabs for n, tabs in breaks):
                raise at(path, number, f"a quoted field goes over rows; {_QUOTES}")
            yield number, pick(row)[:-1]

    return body()
