"""Folders of multi-label webdatasets, and the two that have a name of their own. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CLASSES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
NAMED_DATASETS = ("goi", "imagenet10k")


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
    folders = [Path(root), Path(root) / name]
    counts = [folder / split / "nshards.txt" for folder in folders]
    for folder, count in zip(folders, counts, strict=True):
        if count.is_file():
            return str(folder)
    if "://" in root:
        return root
    raise ValueError(
        f"no webdataset of {name}: neither {counts[0]} nor {counts[1]} exists; give its folder, or the "
        "one it is in, with --dataset_root"
    )


def check_webdataset(
    root: str, split: str, *, names: bool = True, templates: bool = True, flag: str | None = None
) -> None:
    """Look for the text files of a webdataset for zero-shot classification.

    Args:
        root: its folder; for ``eval``, addresses are passed over.
        split: of the shards.
        names: whether there must be class names.
        templates: whether there must be templates.
        flag: by which ``root`` was given, if not to ``eval``.

    Raises:
        ValueError: naming the file that is missing and what to do about it.
    """
    if flag is None and "://" in root:
        return
    hint = "" if flag else "; correct it (it may contain {dataset}) or --split"
    or_names = "" if flag else "pass --custom_classname_file, or "
    or_templates = "" if flag else "pass --templates, or "
    given = f"{flag or '--dataset_root'} {root}"
    count = Path(root) / split / "nshards.txt"
    if not count.is_file():
        raise ValueError(
            f"{given} is no clip_benchmark webdataset: {count} is missing; otter-openclip data "
            f"open-images and imagenet10k write such folders{hint}"
        )
    for path, needed, fix in (
        (Path(root) / CLASSES_FILE, names, f"{or_names}write it with one class a line"),
        (
            Path(root) / TEMPLATES_FILE,
            templates,
            f"{or_templates}write 'a photo of {{c}}.' into it",
        ),
    ):
        if needed and not path.is_file():
            raise ValueError(f"{given}: {path} is missing; {fix}")
