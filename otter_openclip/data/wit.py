"""WIT (Wikipedia image text, v1) as training shards.

Takes the wit_v1.*.tsv.gz files as downloaded and the images, as a folder or archives in which a file is
named by its URL (its last part, as wget and curl -O leave it, or its whole path, as wget -x does), or as
img2dataset wrote them. A row's caption is the first of --caption-fields that it has;
rows without one, and rows in other languages, are left out and counted.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from otter_openclip.data import pairs, tables
from otter_openclip.data.lookup import Picture
from otter_openclip.data.plan import Plan
from otter_openclip.data.sources import PATHS

CAPTION_FIELDS = {
    "reference": "caption_reference_description",
    "alt": "caption_alt_text_description",
    "attribution": "caption_attribution_description",
    "title": "page_title",
    "section": "section_title",
    "page": "context_page_description",
    "section-text": "context_section_description",
}
_DEFAULT_FIELDS = ["reference", "alt", "attribution"]
_PASSES = "attribution_passes_lang_id"
_COLUMNS = ("language", "image_url", _PASSES, *CAPTION_FIELDS.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add, fields = parser.add_argument, ", ".join(CAPTION_FIELDS)
    text = "wit_v1.*.tsv.gz, as downloaded"
    add("--tables", required=True, help=text, **PATHS)
    text = "Wikipedias to take rows from, or all; default en"
    add("--languages", nargs="+", default=["en"], metavar="CODE", help=text)
    text = f"""in order of preference, of {fields}; default {" ".join(_DEFAULT_FIELDS)}. The attribution
        counts only in rows whose {_PASSES} is true: elsewhere it is in another language"""
    kind = {"choices": CAPTION_FIELDS, "default": _DEFAULT_FIELDS, "metavar": "FIELD"}
    add("--caption-fields", nargs="+", help=text, **kind)
    pairs.add_image_options(parser, "folder or archives of files named by URL", required=True)
    pairs.add_pair_output(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    images = pairs.images(args)
    args.languages = sorted(set(args.languages))
    opened = [tables.table(path, _COLUMNS, "\t") for path in args.tables]

    def fill(plan: Plan) -> None:
        for _, fields in tqdm(itertools.chain(*opened), "Reading rows", unit="row"):
            row = dict(zip(_COLUMNS, fields, strict=True))
            caption, url = caption_of(row, args.caption_fields), row["image_url"]
            if "all" not in args.languages and row["language"] not in args.languages:
                plan.skip("in another language")
            elif not caption:
                plan.skip("without a caption")
            else:
                picture = images.find(*([url] if args.img2dataset else file_names(url)))
                if not picture.at_full_path and _of_another_url(picture.name, url):
                    picture = Picture(None)
                plan.add(url, picture, caption)

    return pairs.build(args, args.tables, images, fill, "URL")


def caption_of(row: dict[str, str], fields: Sequence[str]) -> str:
    """The first of ``fields`` that the row has, or ""."""
    for field in fields:
        text = row[CAPTION_FIELDS[field]]
        if text.strip() and (field != "attribution" or row[_PASSES].lower() == "true"):
            return text
    return ""


def _of_another_url(place: str, url: str) -> bool:
    """Whether the file lies, as wget -x has it, under a path of the same host but not this URL's."""
    host = urlsplit(url).netloc
    return f"{host}/" in place and not any(name in place for name in file_names(url)[:2])


def file_names(url: str) -> list[str]:
    """Names that downloaders give the file at ``url``; the last is its last part, decoded."""
    parts = urlsplit(url)
    last, whole = os.path.basename(parts.path), parts.netloc + parts.path
    return [whole, unquote(whole), last, unquote(last)]
