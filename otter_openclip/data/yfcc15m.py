"""YFCC15M, OpenAI's English subset of YFCC100M, as training shards.

Takes the subset's TSV (line number, photo id, hash), YFCC100M's metadata (the 23- or 25-column
tables, one with a header, or JSON lines) and the photos as a folder, zips or tars named by hash or photo
id, or as img2dataset wrote them. A caption is title + ". " + description, each URL-unquoted, its + made
spaces and HTML tags removed, as the reference does. Keys are photo ids.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
from tqdm import tqdm

from otter_openclip.data import pairs
from otter_openclip.data.options import existing_file
from otter_openclip.data.plan import Plan
from otter_openclip.data.tables import lines

_TAG = re.compile("<.*?>")
_COLUMNS = (
    "photoid uid unickname datetaken dateuploaded capturedevice title description usertags "
    "machinetags longitude latitude accuracy pageurl downloadurl licensename licenseurl serverid "
    "farmid secret secretoriginal ext marker"
).split()
# The release has had two forms: with line number and hash in front of and behind the photo id, or not.
_LAYOUTS = {23: _COLUMNS, 25: ["line", "photoid", "key", *_COLUMNS[1:]]}
_NEEDED = ("photoid", "title", "description")
_USED = (*_NEEDED, "downloadurl", "marker")
_VIDEO = "1"
_BATCH = 1 << 16


class Photo(NamedTuple):
    """A row of the metadata."""

    id: str
    title: str
    description: str
    url: str
    marker: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument(
        "--subset", required=True, metavar="FILE", help="yfcc100m_subset_data.tsv[.bz2]"
    )
    parser.add_argument(
        "--metadata",
        required=True,
        nargs="+",
        metavar="FILE",
        help="yfcc100m_dataset[.bz2], or several files of its rows (.bz2, .gz)",
    )
    pairs.add_image_options(
        parser,
        "folder (abc/def/abcdef....jpg by hash, with data/images/ before or not, or flat), zips or tars",
        required=True,
    )
    pairs.add_pair_output(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    subset = existing_file(args.subset, "--subset")
    metadata = [existing_file(path, "--metadata") for path in args.metadata]
    images = pairs.Images(args)

    def fill(plan: Plan) -> None:
        ids, hashes = read_subset(subset)
        find = images.open(plan, ("photoid", "photo_id", "url"), any_suffix=True)
        described = np.zeros(len(ids), bool)
        for row, photo in select(metadata, ids):
            described[row] = True
            if photo.marker == _VIDEO:
                plan.skip("video")
                continue
            names = [photo.id, photo.url]
            if not images.downloaded:
                stem = os.path.splitext(os.path.basename(urlsplit(photo.url).path))[0]
                names = _paths(hashes[row].decode(), photo.id, stem)
            title, description = clean(photo.title), clean(photo.description)
            found = find(*names)
            if found.file is not None and not title.strip() and not description.strip():
                plan.drop(photo.id, pairs.EMPTY_CAPTION)
            else:
                plan.add(photo.id, found, f"{title}. {description}", key=photo.id)
        if not described.all():
            plan.skip("without metadata", int((~described).sum()))

    settings = {"subset": subset, "metadata": metadata}
    inputs = [subset, *metadata, *images.archives]
    return pairs.build(args, settings, inputs, fill, record="photo")


def clean(text: str) -> str:
    """Unquote, make + spaces and remove tags, in the order of the reference's data/yfcc.py."""
    return _TAG.sub("", unquote(text).replace("+", " "))


def read_subset(path: str) -> tuple[np.ndarray, np.ndarray]:
    """The subset's photo ids (int64, sorted, each once) and hashes (bytes).

    Raises:
        ValueError: naming the line, if it is not line number, photo id and hash.
    """

    def rows() -> Iterator[tuple[int, str]]:
        for number, line in tqdm(lines(path), "Reading subset", unit="photo"):
            fields = line.split("\t")
            if len(fields) != 3 or not fields[0].isdigit() or not fields[1].isdigit():
                if number == 1 and not any(field.isdigit() for field in fields):
                    continue
                raise ValueError(f"{path}:{number}: expected line number, photo id and hash")
            yield int(fields[1]), fields[2]

    table = np.fromiter(rows(), np.dtype([("id", np.int64), ("hash", "S32")]))
    if not len(table):
        raise ValueError(f"{path}: no photos in it")
    ids, first = np.unique(table["id"], return_index=True)
    return ids, table["hash"][first]


def select(paths: Iterable[str], ids: np.ndarray) -> Iterator[tuple[int, Photo]]:
    """The metadata of the photos in ``ids`` (sorted), with the photo's place there."""
    with tqdm(desc="Reading metadata", unit="row", unit_scale=True) as bar:
        for path in paths:
            rows = read_metadata(path)
            while batch := list(islice(rows, _BATCH)):
                found = np.array([int(photo.id) for photo in batch], np.int64)
                places = np.minimum(np.searchsorted(ids, found), len(ids) - 1)
                for n in np.flatnonzero(ids[places] == found):
                    yield int(places[n]), batch[n]
                bar.update(len(batch))


def read_metadata(path: str) -> Iterator[Photo]:
    """The rows of a YFCC100M metadata file.

    Raises:
        ValueError: naming the line, if its columns are not those of any known form.
    """
    columns: list[str] | None = None
    places: list[int] = []
    for number, line in lines(path):
        if line.startswith("{"):
            photo = _from_json(line, path, number)
        else:
            fields = line.split("\t")
            if columns is None:
                header = "photoid" in fields
                columns = fields if header else _LAYOUTS.get(len(fields), [])
                missing = [name for name in _NEEDED if name not in columns]
                if not missing:
                    places = [columns.index(n) if n in columns else -1 for n in _USED]
                if header and not missing:
                    continue
            if not places or len(fields) != len(columns):
                raise ValueError(
                    f"{path}:{number}: {len(fields)} columns; YFCC100M's metadata have "
                    f"{' or '.join(map(str, _LAYOUTS))}, or a header with {', '.join(_NEEDED)}"
                )
            photo = Photo(*("" if n < 0 else fields[n] for n in places))
        if not photo.id.isdigit():
            raise ValueError(f"{path}:{number}: {photo.id!r} is no photo id")
        yield photo


def _from_json(line: str, path: str, number: int) -> Photo:
    try:
        values = json.loads(line)
        needed = [values[name] for name in _NEEDED]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path}:{number}: no JSON object with {', '.join(_NEEDED)} ({error})"
        ) from error
    rest = [values.get(name) for name in _USED[len(_NEEDED) :]]
    return Photo(*("" if value is None else str(value) for value in [*needed, *rest]))


def _paths(code: str, photo: str, stem: str) -> list[str]:
    nested = f"{code[:3]}/{code[3:6]}/{code}.jpg"
    names = [nested, f"data/images/{nested}", f"{code}.jpg", f"{photo}.jpg"]
    return [*names, f"{stem}.jpg"] if stem else names
