"""Multi-label webdatasets: the two with a name of their own, and what is asked of any."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clip_benchmark.datasets.builder import build_wds_dataset

NAMED_DATASETS = ("goi", "imagenet10k")
CLASSES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"


class Names(list):
    """A list that clip_benchmark does not print in full: it may be 20,000 names long."""

    def __repr__(self) -> str:
        if len(self) <= 10:
            return super().__repr__()
        return f"[{', '.join(map(repr, self[:5]))}, ... {len(self)} in all]"


def shorten_names(dataset: Any) -> None:
    """Make the class names and templates of clip_benchmark's ``dataset`` lists that print shortened."""
    for attribute in ("classes", "templates"):
        if isinstance(names := getattr(dataset, attribute), list):
            setattr(dataset, attribute, Names(names))


def named_root(name: str, root: str, split: str) -> str:
    """The webdataset of ``name``: ``root`` itself, or the folder of that name in it.

    Raises:
        ValueError: if neither is one.
    """
    if "://" in root:
        return root
    candidates = [Path(root), Path(root) / name]
    for folder in candidates:
        if (folder / split / "nshards.txt").is_file():
            return str(folder)
    raise ValueError(
        f"no webdataset of {name}: neither {candidates[0] / split / 'nshards.txt'} nor "
        f"{candidates[1] / split / 'nshards.txt'} exists; give its folder, or the one it is in, with "
        "--dataset_root"
    )


def check_root(root: str, split: str) -> None:
    """Raise ValueError if there is no webdataset in the local folder ``root``."""
    count = Path(root) / split / "nshards.txt"
    if "://" not in root and not count.is_file():
        raise ValueError(
            f"{root} is no clip_benchmark webdataset: {count} is missing; correct --dataset_root (it "
            "may contain {dataset}) or --split"
        )


def open_named(
    name: str,
    *,
    root: str,
    transform: Any,
    split: str,
    wds_cache_dir: str | None = None,
    custom_classname_file: str | None = None,
    custom_template_file: str | None = None,
    **_: Any,
) -> Any:
    """The webdataset of ``name``, from the arguments of clip_benchmark's ``build_dataset``.

    Raises:
        ValueError: if it is not there, or its class names or templates are neither there nor given.
    """
    root = named_root(name, root, split)
    dataset = build_wds_dataset(name, transform, split, root, wds_cache_dir)
    if dataset.classes is None and not custom_classname_file:
        raise ValueError(f"Classes not specified for {name}: {classes_missing(root)}")
    if dataset.templates is None and not custom_template_file:
        raise ValueError(f"Templates not specified for {name}: {templates_missing(root)}")
    shorten_names(dataset)
    return dataset


def classes_missing(root: str) -> str:
    """What to do about it."""
    return (
        f"{Path(root) / CLASSES_FILE} is missing; write it with one class a line, or pass "
        "--custom_classname_file"
    )


def templates_missing(root: str) -> str:
    """What to do about it."""
    return f"{Path(root) / TEMPLATES_FILE} is missing; pass --templates, e.g. --templates simple"


@contextlib.contextmanager
def templates_file(templates: Sequence[str]) -> Iterator[str]:
    """Path of ``templates`` as ``--custom_template_file``, for any dataset."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        # Of any dataset: the key that clip_benchmark falls back on.
        json.dump({"imagenet1k": list(templates)}, file)
        file.flush()
        yield file.name
