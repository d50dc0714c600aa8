"""A Hugging Face dataset with a column of images and one of captions as training shards.

Takes parquet files as they are on the hub, and what datasets' save_to_disk writes. Needs pyarrow.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from tqdm import tqdm

from otter_openclip.data import pairs, sources, unpacking
from otter_openclip.data.lookup import Picture
from otter_openclip.data.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add, kind = parser.add_argument, sources.absolute
    text = "folders with .parquet or .arrow files in them or below, or such files"
    add("--dataset", required=True, nargs="+", type=kind, metavar="PATH", help=text)
    add("--text-key", metavar="NAME", help="column; default: the only one of text")
    pairs.add_pair_output(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    _, files = sources.expand(args.dataset, sources.TABLES, inside="**")
    # Beside the data lies, as cache-*, what datasets' map and filter made of them.
    files = [f for f in files if f in args.dataset or "cache-" != os.path.basename(f)[:6]]
    if not files:
        raise FileNotFoundError(f"--dataset {' '.join(args.dataset)}: no .parquet or .arrow there")

    def fill(plan: Plan) -> None:
        for path in files:
            tar, key = unpacking.local(path, plan.folder / "unpacked"), args.text_key
            for row in tqdm(sources.samples(tar), os.path.basename(path), unit="row"):
                values = json.loads(row.metadata)
                key = key or text_column(values, path)
                if key not in values:
                    fault = f"no column {key!r} but {', '.join(values)}"
                    raise ValueError(f"{path}: {fault}; --text-key")
                file = row.file
                if file is None and (name := values.get("image_path")):
                    beside = os.path.join(os.path.dirname(path), name)
                    file = sources.File(beside) if os.path.isfile(beside) else None
                captions = values[key] if isinstance(values[key], list) else [values[key]]
                name = f"{path} row {int(row.name)}"
                for caption in captions or [None]:
                    if not isinstance(caption, str | None):
                        raise ValueError(f"{name}: no text in {key!r}, but {caption!r}; --text-key")
                    plan.add(name, Picture(file), caption or "")

    return pairs.build(args, files, None, fill, "row")


def text_column(values: dict[str, Any], path: str) -> str:
    """The only column whose value is text, texts, or missing; ValueError if there is not one."""
    first = {name: (v or [None])[0] if isinstance(v, list) else v for name, v in values.items()}
    text = [name for name, v in first.items() if isinstance(v, str | None)]
    text = [name for name in text if name != "image_path"]
    if len(text) != 1:
        fault = f"{len(text)} columns of text among {', '.join(values)}; choose with --text-key"
        raise ValueError(f"{path}: {fault}")
    return text[0]
