"""A Hugging Face dataset with a column of images and one of captions as training shards.

Takes parquet files as they are on the hub, and the arrow files that datasets' save_to_disk writes or
its cache has. Needs pyarrow.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from otter_openclip.cli import as_list, needs
from otter_openclip.data import pairs, tables
from otter_openclip.data.lookup import Picture
from otter_openclip.data.plan import Plan
from otter_openclip.data.sources import PATHS, File
from otter_openclip.files import written_whole

_ENDS = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0")  # of parquet, arrow's files and streams
# The words by which datasets knows a split in the names of files and folders.
_WORDS = {
    "train": "train training",
    "validation": "validation valid val dev",
    "test": "test testing eval evaluation",
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words.split()}
# The types of columns, as arrow writes them.
_IMAGES = re.compile(r"(\w*list<\w+: )?(struct<.*\bbytes: |(large_)?binary)")
_TEXTS = re.compile(r"(\w*list<\w+: |dictionary<values=)*(large_)?string")
_TABLE = re.compile(r"(?!cache-).*[.](parquet|arrow)")
_PART = re.compile(r"(?:.*-)?(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\b")  # of a split's files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add = parser.add_argument
    text = "folders with .parquet or .arrow files in them or below, or such files"
    add("--dataset", required=True, help=text, **PATHS)
    text = "which to take of a folder with several (train, validation, ...)"
    add("--split", action="extend", nargs="+", metavar="NAME", help=text)
    add("--image-key", metavar="NAME", help="column of images; default: the only one")
    add("--text-key", default="text", metavar="NAME", help="column of captions; default text")
    pairs.add_pair_output(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    files = find_files(args.dataset, args.split)

    def fill(plan: Plan) -> None:
        folder = plan.folder / "unpacked"
        folder.mkdir(exist_ok=True)
        image_key = args.image_key or image_column(files[0])
        print(f"Images are in the column {image_key!r}, captions in {args.text_key!r}.")
        for number, path in enumerate(files):
            images = folder / f"{number}.images"
            with written_whole(images) as out:
                for row, content, place, captions in rows(path, image_key, args.text_key):
                    file = File(os.path.join(os.path.dirname(path), place)) if place else None
                    if content:
                        file = File(str(images), out.tell(), len(content))
                        out.write(content)
                    for caption in captions:
                        plan.add(row, Picture(file), caption)

    return pairs.build(args, files, None, fill, "row")


def find_files(paths: Sequence[str], wanted: Sequence[str] | None = None) -> list[str]:
    """The tables that ``paths`` are or hold, each once; of several splits those ``wanted``.

    FileNotFoundError if a path has none; ValueError if it has several splits and none is wanted, or not
    the one that is, or two files that are the same part of a split.
    """
    files: list[str] = []
    for path in paths:
        parts: dict[str, dict[str, str]] = {}
        inside = sorted(_tables(path), key=lambda table: table[1]) if os.path.isdir(path) else []
        if not inside and not os.path.isfile(path):
            raise FileNotFoundError(f"--dataset {path}: no .parquet or .arrow there")
        # The hub's cache has a link for each revision of a dataset.
        inside = inside or [(split_of(os.path.basename(path)), path)]
        for split, table in {os.path.realpath(table[1]): table for table in inside}.values():
            part = os.path.basename(table)  # folders of configurations and of copies have the same
            if (first := parts.setdefault(split, {}).setdefault(part, table)) != table:
                fix = "of two datasets, or two versions of one; name one's folder, or each"
                raise ValueError(f"--dataset {path}: {first} and {table} are the same part {fix}")
        splits = [_SPLITS.get(name, name) for name in wanted or parts]
        listed = ", ".join(sorted(parts))
        if wrong := [split for split in splits if split not in parts]:
            raise ValueError(f"--split {wrong[0]}: the splits of {path} are {listed}")
        if not wanted and len(parts) > 1:
            raise ValueError(f"--dataset {path} has several splits ({listed}); name yours: --split")
        files += (table for split in dict.fromkeys(splits) for table in parts[split].values())
    return list({os.path.realpath(path): path for path in files}.values())


def _tables(folder: str, place: str = "") -> Iterator[tuple[str, str]]:
    """(split, path) of the tables in a folder and below: those that datasets' indexes name, if any.

    Else all, but those that only lie there as cache-*: what datasets' map and filter made of the others.
    """
    if splits := _index(f"{folder}/dataset_dict.json").get("splits"):
        for split in splits:
            for _, path in _tables(os.path.join(folder, split), split):
                yield _SPLITS.get(split, split), path
        return
    state = _index(f"{folder}/state.json")
    if files := state.get("_data_files"):
        names = [file["filename"] for file in files]
    else:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
    for name in names:
        path, inside = os.path.join(folder, name), os.path.join(place, name)
        if os.path.isdir(path):
            yield from _tables(path, inside)
        elif files or _TABLE.fullmatch(name):
            yield state.get("_split") or split_of(inside), path


def _index(path: str) -> dict[str, Any]:
    """What is in a file that datasets writes beside its tables; nothing if there is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not what datasets' save_to_disk writes: {error}") from error


def split_of(path: str) -> str:
    """The split that datasets takes a table for, by its path in the dataset."""
    part = _PART.match(os.path.basename(path))
    named = part[1] if part else ""
    for place in (named, *reversed(path.split(os.sep))):
        for word in re.split(r"[-._ \d]+", place.lower()):
            if word in _SPLITS:  # but train_sft is a split of its own
                return named if place == named and named.lower() != word else _SPLITS[word]
    return named or "train"


def image_column(path: str) -> str:
    """The one column of images that a table has; ValueError if it has none or several."""
    with _opened(path) as (schema, _):
        columns = [field.name for field in schema if _IMAGES.match(str(field.type))]
        if len(columns) != 1:
            fault = f"{len(columns)} columns of images among {', '.join(schema.names)}"
            raise ValueError(f"{path}: {fault}; --image-key")
        return columns[0]


def rows(
    path: str, image_key: str, text_key: str
) -> Iterator[tuple[str, bytes | None, str | None, list[str]]]:
    """The name of each row of a table, its image's bytes and path, and its captions, "" for none.

    An image is bytes, a path, {bytes, path}, or a list of one of these. ValueError if a column is not
    there or is there twice, or a row holds something else in it; OSError if the file is damaged;
    RuntimeError if pyarrow is missing.
    """
    with _opened(path) as (schema, batches):
        listed = ", ".join(schema.names)
        texts = ", ".join(field.name for field in schema if _TEXTS.match(str(field.type)))
        texts = texts or f"none of texts among {listed}"
        for flag, key, columns in (("image", image_key, listed), ("text", text_key, texts)):
            if schema.names.count(key) != 1:
                raise ValueError(f"{path}: not one column {key!r} but {columns}; --{flag}-key")
        keys = image_key, text_key
        columns = ([batch.column(key).to_pylist() for key in keys] for batch in batches)
        values = itertools.chain.from_iterable(itertools.starmap(zip, columns))
        for number, (image, captions) in enumerate(
            tqdm(values, os.path.basename(path), unit="row")
        ):
            row, captions = f"{path} row {number}", as_list(captions) or [None]
            if len(images := as_list(image)) > 1:
                raise ValueError(f"{row}: {len(images)} images in {image_key!r}, where one is due")
            image = images[0] if images else None
            if not isinstance(image, dict):
                image = {"path" if isinstance(image, str) else "bytes": image}
            content = image.get("bytes")
            if not isinstance(content, bytes | None):
                raise ValueError(f"{row}: no image in {image_key!r}, but {content!r}; --image-key")
            for caption in captions:
                if not isinstance(caption, str | None):
                    fault = f"no text in {text_key!r}, but {caption!r}; --text-key: {texts}"
                    raise ValueError(f"{row}: {fault}")
            yield row, content, image.get("path"), [caption or "" for caption in captions]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Schema and batches of a table; OSError, in the end, if its end is not there."""
    needs("pyarrow", "parquet")
    import pyarrow
    from pyarrow import ipc, parquet

    with open(path, "rb") as file, tables.damage_named(path, pyarrow.ArrowException):
        if not path.endswith(".arrow"):
            reader = parquet.ParquetFile(file)
            schema, batches = reader.schema_arrow, reader.iter_batches(batch_size=64)
        elif file.peek(6).startswith(b"ARROW1"):
            reader = ipc.open_file(file)
            schema, batches = reader.schema, map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = ipc.open_stream(file)
            schema = batches.schema
        yield schema, batches
        file.seek(-8, os.SEEK_END)
        if not file.read().endswith(_ENDS):  # pyarrow takes a stream that stops for one that ends
            raise EOFError("its end is not there")
