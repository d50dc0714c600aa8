"""WIT (Wikipedia image text, v1) as training shards.

Takes the wit_v1.*.tsv.gz files as downloaded and the images, as a folder or archives in which a file is
named by its URL (its last part, as wget and curl -O leave it; its whole path, as wget -x does; or the
URL's MD5), or as img2dataset wrote them. A row's caption is the first of --caption-fields that it has;
rows without one, and rows in other languages, are left out and counted.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from otter_openclip.data import pairs, sources
from otter_openclip.data.options import existing_file
from otter_openclip.data.shards import MISSING, NOT_DOWNLOADED, Planner
from otter_openclip.data.tables import csv_rows

CAPTION_FIELDS = {
    "reference": "caption_reference_description",
    "alt": "caption_alt_text_description",
    "attribution": "caption_attribution_description",
    "title": "page_title",
    "section": "section_title",
    "page": "context_page_description",
    "section-text": "context_section_description",
}
_DEFAULT_FIELDS = ("reference", "alt", "attribution")
_PASSES = "attribution_passes_lang_id"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument(
        "--tables", required=True, nargs="+", metavar="FILE", help="wit_v1.*.tsv.gz, as downloaded"
    )
    parser.add_argument(
        "--languages",
        nargs="+",
        default=["en"],
        metavar="CODE",
        help="Wikipedias to take rows from, or all; default en",
    )
    parser.add_argument(
        "--caption-fields",
        nargs="+",
        choices=CAPTION_FIELDS,
        default=list(_DEFAULT_FIELDS),
        metavar="FIELD",
        help=f"in order of preference, of {', '.join(CAPTION_FIELDS)}; default "
        f"{' '.join(_DEFAULT_FIELDS)}. The attribution counts only in rows whose {_PASSES} is true: "
        "elsewhere it is in another language",
    )
    pairs.add_image_options(parser, "folder or archives of files named by URL", required=True)
    pairs.add_pair_output(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    tables = [existing_file(path, "--tables") for path in args.tables]
    folders, archives = sources.expand(args.images or args.img2dataset)
    languages = None if "all" in args.languages else set(args.languages)

    def plan(planner: Planner) -> None:
        unpacked = sources.unpacked(archives, planner.folder / "unpacked")
        planner.archives += map(str, unpacked)
        if args.img2dataset:
            downloaded = sources.Downloaded(folders, unpacked, ("url",), args.workers)
        else:
            index = sources.index_archives(unpacked, sources.by_file_name, args.workers)
            places = sources.Folders(folders, len(file_names("http://a/b")))
        urls: dict[int, int] = {}
        rows = (row for table in tables for row in read_table(table))
        for row in tqdm(rows, "Reading rows", unit="row"):
            if languages is not None and row["language"] not in languages:
                planner.skip("in another language")
                continue
            caption, url = caption_of(row, args.caption_fields), row["image_url"]
            if not caption:
                planner.skip("without a caption")
                continue
            if args.img2dataset:
                locator = downloaded.find(url)
            else:
                names = file_names(url)
                known = urls.setdefault(sources.digest(names[-1]), sources.digest(url))
                if known != sources.digest(url):
                    planner.drop(url, "file name of another URL", names[-1])
                    continue
                found = (index.find(os.path.basename(name)) for name in names)
                locator = next(filter(None, found), None) or places.find(names)
            if locator is None and args.img2dataset:
                planner.skip(NOT_DOWNLOADED)
            elif locator is None:
                planner.drop(url, MISSING)
            else:
                planner.add(url, locator, caption, identity=f"{url}\n{caption}")

    settings = {
        "tables": [str(table) for table in tables],
        "languages": sorted(args.languages),
        "caption-fields": args.caption_fields,
    }
    return pairs.build(args, settings, [*tables, *archives], plan)


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a WIT file, by column name.

    Raises:
        ValueError: if a column is missing, or naming the line, if fields are.
    """
    rows = csv_rows(path, "\t")
    _, header = next(rows, (0, []))
    needed = ["language", "image_url", _PASSES, *CAPTION_FIELDS.values()]
    missing = [name for name in needed if name not in header]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]} in its first line; is it a WIT v1 file?")
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}:{number}: {len(row)} fields, the header has {len(header)}")
        yield dict(zip(header, row, strict=True))


def caption_of(row: dict[str, str], fields: Sequence[str]) -> str:
    """The first of ``fields`` that the row has, or ""."""
    for field in fields:
        text = row[CAPTION_FIELDS[field]]
        if field == "attribution" and row[_PASSES].lower() != "true":
            continue
        if text.strip():
            return text
    return ""


def file_names(url: str) -> list[str]:
    """Names that downloaders give the file at ``url``; the last is its last part, decoded."""
    parts = urlsplit(url)
    last = os.path.basename(parts.path)
    suffix = os.path.splitext(last)[1]
    path = parts.path.lstrip("/")
    return [
        hashlib.md5(url.encode()).hexdigest() + suffix,
        f"{parts.netloc}/{path}",
        f"{parts.netloc}/{unquote(path)}",
        last,
        unquote(last),
    ]
