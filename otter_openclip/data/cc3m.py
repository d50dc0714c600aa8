"""Conceptual Captions (CC3M) as training shards.

Takes the official TSV (caption, URL) and the images either as the reference's downloader left them, its
report TSV and folder, or as img2dataset did. Also writes the OTTER reference's processed_labels.csv of
the pairs whose image can be read, where the images are files; open_clip takes it with
--dataset-type csv --csv-separator , --csv-img-key filename --csv-caption-key caption.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from otter_openclip.data import pairs
from otter_openclip.data.lookup import NOT_DOWNLOADED, Picture
from otter_openclip.data.plan import Plan
from otter_openclip.data.sources import absolute
from otter_openclip.data.tables import at, lines
from otter_openclip.files import written_whole

LABELS_FILE = "processed_labels.csv"
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
# Of github.com/igorbrigadir/DownloadConceptualCaptions, which the reference uses; no header.
_REPORT = ("file", "folder", "mimetype", "size", "status", "url")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add = parser.add_argument
    text = "Train_GCC-training.tsv, as downloaded"
    add("--captions", required=True, type=absolute, metavar="FILE", help=text)
    text = "downloaded_training_report.tsv[.gz] of the reference's downloader; goes with --images"
    add("--report", type=absolute, metavar="FILE", help=text)
    text = "folder or archives that the report's file names (training/0_1595581236) start from"
    pairs.add_image_options(parser, text, required=True)
    pairs.add_pair_output(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    if (args.report is None) != (args.images is None):
        raise ValueError("--report and --images go together; with --img2dataset neither is needed")
    images = pairs.images(args)

    def fill(plan: Plan) -> None:
        plan.db.execute("CREATE TEMP TABLE saved (url TEXT PRIMARY KEY, name TEXT)")
        if args.report:
            saved = read_report(args.report)
            plan.db.executemany("INSERT OR IGNORE INTO saved VALUES (?, ?)", saved)
        query = "SELECT name FROM saved WHERE url = ?"
        for caption, url in tqdm(read_captions(args.captions), "Reading captions", unit="caption"):
            name = plan.db.execute(query, (url,)).fetchone() if args.report else (url,)
            picture = images.find(*name) if name else Picture(None, reason=NOT_DOWNLOADED)
            plan.add(url, picture, caption)

    inputs = [args.captions, *([args.report] if args.report else [])]
    return pairs.build(args, inputs, images, fill, "URL", write_labels)


def read_captions(path: str) -> Iterator[tuple[str, str]]:
    """(caption, URL) of the official TSV, with or without the header that img2dataset's guide adds."""
    for fields in _fields(path, ("caption", "URL")):
        if fields != ["caption", "url"]:
            yield _unquoted(fields[0]), fields[1].strip()


def read_report(path: str) -> Iterator[tuple[str, str]]:
    """(URL, file name) of the images that the downloader has saved."""
    for name, _, _, _, status, url in _fields(path, _REPORT):
        if name and status in ("200", "200.0"):
            yield _unquoted(url.strip()), _unquoted(name)


def _fields(path: str, columns: tuple[str, ...]) -> Iterator[list[str]]:
    """The fields of lines that are not empty; ValueError naming one that has not so many."""
    for number, line in lines(path):
        fields = line.split("\t")
        if len(fields) == len(columns):
            yield fields
        elif line:
            raise at(path, number, f"{len(fields)} columns, expected {', '.join(columns)}")


def write_labels(output: Path, plan: Plan) -> None:
    """Write processed_labels.csv (row number, filename, caption) if the images are files.

    The reference has paths relative to its data folder; these are absolute, which its reader joins just
    as well and open_clip needs.
    """
    rows = ((s.file.path, s.text) for s in plan.written() if s.file.offset is None)
    if (first := next(rows, None)) is None:
        return
    with written_whole(output / LABELS_FILE, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["", "filename", "caption"], [0, *first]])
        writer.writerows([number, *row] for number, row in enumerate(rows, 1))


def _unquoted(field: str) -> str:
    """The field without the quotes that pandas puts around some, and strips again."""
    quoted = _QUOTED.fullmatch(field)
    return quoted[1].replace('""', '"') if quoted else field
