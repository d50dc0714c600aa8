"""YFCC15M, OpenAI's English subset of YFCC100M, as training shards.

Takes the subset's TSV (line number, photo id, hash), YFCC100M's metadata (tables of 23 or 25 columns)
and the photos as a folder, zips or tars named by hash or photo
id, or as img2dataset wrote them. A caption is title + ". " + description, each URL-unquoted, its + made
spaces and HTML tags removed, as the reference does. Keys are photo ids.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from otter_openclip.data import pairs
from otter_openclip.data.plan import Plan
from otter_openclip.data.sources import PATHS, absolute
from otter_openclip.data.tables import at, lines

_TAG = re.compile("<.*?>")
_COLUMNS = (
    "photoid uid unickname datetaken dateuploaded capturedevice title description usertags "
    "machinetags longitude latitude accuracy pageurl downloadurl licensename licenseurl serverid "
    "farmid secret secretoriginal ext marker"
).split()
# The release has had two forms: with line number and hash in front of and behind the photo id, or not.
_LAYOUTS = {23: _COLUMNS, 25: ["line", "photoid", "key", *_COLUMNS[1:]]}
_VIDEO = "1"
_ID = re.compile("0|[1-9][0-9]{0,17}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add, kind = parser.add_argument, absolute
    text = "yfcc100m_subset_data.tsv[.bz2]"
    add("--subset", required=True, type=kind, metavar="FILE", help=text)
    text = "yfcc100m_dataset[.bz2], or several files of its rows (.bz2, .gz)"
    add("--metadata", required=True, help=text, **PATHS)
    text = "folder (abc/def/abcdef....jpg by hash, below data/images or flat), zips or tars"
    pairs.add_image_options(parser, text, required=True)
    pairs.add_pair_output(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    images = pairs.images(args, any_suffix=True)

    def fill(plan: Plan) -> None:
        execute, subset = plan.db.execute, read_subset(args.subset)
        execute("CREATE TEMP TABLE wanted (id INTEGER PRIMARY KEY, hash TEXT, seen INT)")
        plan.db.executemany("INSERT OR IGNORE INTO wanted VALUES (?, ?, 0)", subset)
        rows = (row for path in args.metadata for row in read_metadata(path))
        for row in tqdm(rows, "Reading metadata", unit="row", unit_scale=True):
            photo, url = row["photoid"], row["downloadurl"]
            wanted = execute("SELECT hash FROM wanted WHERE id = ?", (int(photo),)).fetchone()
            if wanted is None:
                continue
            execute("UPDATE wanted SET seen = 1 WHERE id = ?", (int(photo),))
            if row["marker"] == _VIDEO:
                plan.skip("video")
                continue
            names = (url,) if args.img2dataset else file_names(wanted[0], photo, url)
            texts = clean(row["title"]), clean(row["description"])
            caption = ". ".join(texts) if "".join(texts).strip() else ""
            plan.add(photo, images.find(*names), caption, key=photo)
        (without,) = execute("SELECT COUNT(*) FROM wanted WHERE NOT seen").fetchone()
        if without:
            plan.skip("without metadata", without)

    return pairs.build(args, [args.subset, *args.metadata], images, fill, "photo")


def clean(text: str) -> str:
    """Unquote, make + spaces and remove tags, in the order of the reference's data/yfcc.py."""
    return _TAG.sub("", unquote(text).replace("+", " "))


def read_subset(path: str) -> Iterator[tuple[int, str]]:
    """(photo id, hash) of each line; ValueError naming one that is not number, photo id and hash."""
    number = 0
    for number, line in tqdm(lines(path), "Reading subset", unit="photo"):
        fields = line.split("\t")
        if len(fields) == 3 and fields[0].isdigit() and _ID.fullmatch(fields[1]):
            yield int(fields[1]), fields[2]
        elif number > 1 or any(field.isdigit() for field in fields):
            raise at(path, number, "expected line number, photo id and hash")
    if not number:
        raise ValueError(f"{path}: no photos in it")


def read_metadata(path: str) -> Iterator[dict[str, str]]:
    """The rows of a YFCC100M metadata file, by column.

    ValueError names the line whose columns are not those of a known form.
    """
    for number, line in lines(path):
        fields = line.split("\t")
        columns = _LAYOUTS.get(len(fields))
        if columns is None:
            forms = " or ".join(map(str, _LAYOUTS))
            raise at(path, number, f"{len(fields)} columns; YFCC100M's metadata have {forms}")
        row = dict(zip(columns, fields, strict=True))
        if not _ID.fullmatch(row["photoid"]):
            raise at(path, number, f"{row['photoid']!r} is no photo id")
        yield row


def file_names(code: str, photo: str, url: str) -> list[str]:
    """Where the photo of a hash, id and URL may be."""
    nested = f"{code[:3]}/{code[3:6]}/{code}.jpg"
    stem = os.path.splitext(os.path.basename(urlsplit(url).path))[0]
    flat = [f"{name}.jpg" for name in (code, photo, stem) if name]
    return [nested, f"data/images/{nested}", *flat]
