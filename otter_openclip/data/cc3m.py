"""Conceptual Captions (CC3M) as training shards.

Takes the official TSV (caption, URL) and the images either as the reference's downloader left them, its
report TSV and folder, or as img2dataset did. Also writes the OTTER reference's processed_labels.csv of
the pairs whose image can be read, where the images are files; open_clip takes it with
--dataset-type csv --csv-separator , --csv-img-key filename --csv-caption-key caption.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from otter_openclip.data import pairs, sources
from otter_openclip.data.options import existing_file
from otter_openclip.data.shards import NOT_DOWNLOADED, Planner, Result
from otter_openclip.data.tables import lines
from otter_openclip.files import written_whole

LABELS_FILE = "processed_labels.csv"
# Of github.com/igorbrigadir/DownloadConceptualCaptions, which the reference uses; no header.
_REPORT_COLUMNS = ("file", "folder", "mimetype", "size", "status", "url")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument(
        "--captions", required=True, metavar="FILE", help="Train_GCC-training.tsv, as downloaded"
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="downloaded_training_report.tsv[.gz] of the reference's downloader; goes with --images",
    )
    pairs.add_image_options(
        parser,
        "folder that the report's file names (training/0_1595581236) start from",
        required=True,
    )
    pairs.add_pair_output(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    captions = existing_file(args.captions, "--captions")
    if (args.report is None) != (args.images is None):
        raise ValueError("--report and --images go together; with --img2dataset neither is needed")
    report = None if args.report is None else existing_file(args.report, "--report")
    folders, archives = sources.expand(args.images or args.img2dataset)
    if report is not None:
        folders, archives = [Path(os.path.abspath(path)) for path in args.images], []
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"--images {folder}: the report's files must lie in a folder")

    def plan(planner: Planner) -> None:
        if report is None:
            unpacked = sources.unpacked(archives, planner.folder / "unpacked")
            planner.archives += map(str, unpacked)
            downloaded = sources.Downloaded(folders, unpacked, ("url",), args.workers)
            find = downloaded.find
        else:
            files = read_report(report)

            def find(url: str) -> sources.Locator | None:
                name = files.get(sources.digest(url))
                return None if name is None else [os.path.join(f, name) for f in folders]

        for caption, url in tqdm(read_captions(captions), "Reading captions", unit="caption"):
            locator = find(url)
            if locator is None:
                planner.skip(NOT_DOWNLOADED)
            elif not caption.strip():
                planner.drop(url, pairs.EMPTY_CAPTION)
            else:
                planner.add(url, locator, caption, identity=f"{locator}\n{caption}")

    return pairs.build(
        args,
        {"captions": str(captions), "report": report and str(report)},
        [captions, *([report] if report else []), *archives],
        plan,
        write_labels,
    )


def read_captions(path: Path) -> Iterator[tuple[str, str]]:
    """(caption, URL) of the official TSV, with or without the header that img2dataset's guide adds.

    Raises:
        ValueError: naming the line, if it has not two columns.
    """
    for number, line in lines(path):
        fields = line.split("\t")
        if fields == ["caption", "url"] or not line:
            continue
        if len(fields) != 2:
            raise ValueError(f"{path}:{number}: {len(fields)} columns, expected caption and URL")
        yield _unquoted(fields[0]), fields[1].strip()


def read_report(path: Path) -> dict[int, str]:
    """Digest of the URL -> file name of the images that the downloader has saved.

    Raises:
        ValueError: naming the line, if it has not the report's six columns.
    """
    found: dict[int, str] = {}
    for number, line in lines(path):
        fields = line.split("\t")
        if not line or fields[0] in ("file", "filename"):
            continue
        if len(fields) != len(_REPORT_COLUMNS):
            raise ValueError(
                f"{path}:{number}: {len(fields)} columns, expected {', '.join(_REPORT_COLUMNS)}"
            )
        name, status, url = fields[0], fields[4], fields[5]
        if name and status in ("200", "200.0"):
            found.setdefault(sources.digest(_unquoted(url.strip())), _unquoted(name))
    return found


def write_labels(output: Path, result: Result) -> None:
    """Write processed_labels.csv (row number, filename, caption) if the images are files.

    The reference has paths relative to its data folder; these are absolute, which its reader joins just
    as well and open_clip needs.
    """
    kept = ((sample.locator, sample.payload) for sample in result.kept())
    rows = ((_existing(paths), text) for paths, text in kept if isinstance(paths[0], str))
    first = next(rows, None)
    if first is None:
        return
    with written_whole(output / LABELS_FILE, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["", "filename", "caption"])
        writer.writerow([0, *first])
        writer.writerows([number, *row] for number, row in enumerate(rows, 1))


def _existing(paths: sources.Locator) -> str:
    return str(next(path for path in paths if len(paths) == 1 or os.path.exists(path)))


def _unquoted(field: str) -> str:
    """The field without the quotes that pandas puts around some, and strips again."""
    inner = field[1:-1].replace('""', "")
    if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner:
        return field[1:-1].replace('""', '"')
    return field
