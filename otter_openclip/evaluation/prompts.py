"""Class names and templates, refused alike on every way in, and their prompts. Imports no torch."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

CLASSES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
SIMPLE = "a photo of {c}."


def check_webdataset(
    root: str,
    split: str = "test",
    *,
    names: bool = True,
    templates: bool = True,
    flag: str = "--dataset_root",
) -> None:
    """Raise ValueError if a text file of the webdataset ``root``, given by ``flag``, is missing.

    Whoever evaluates calls it before anything is loaded; ``names`` and ``templates`` say whether the
    dataset must bring its own. Addresses are passed over for ``eval``.
    """
    of_eval = flag == "--dataset_root"
    if of_eval and "://" in root:
        return
    for name, needed, fix, or_else in (
        (
            f"{split}/nshards.txt",
            True,
            "otter-openclip data builds such folders",
            "correct --split",
        ),
        (CLASSES_FILE, names, "write one class a line", "pass --custom_classname_file"),
        (TEMPLATES_FILE, templates, f"write {SIMPLE!r} into it", "pass --templates"),
    ):
        if needed and not (path := Path(root) / name).is_file():
            raise ValueError(
                f"{flag} {root} is no clip_benchmark webdataset of classes: {path} is missing; "
                f"{f'{or_else}, or ' if of_eval else ''}{fix}"
            )


def class_prompts(
    dataset: Any, *, names_from: str | None = None, templates_from: str | None = None
) -> list[tuple[str, ...]]:
    """Each class's prompts, of a webdataset as clip_benchmark opened it.

    Its ``classes`` are names; its ``templates`` a list with ``{c}`` for the name, of which blank ones
    are dropped, or a dict of each name's prompts. Both may be from other files than the dataset's own.

    Raises:
        ValueError: naming the file and the line of what cannot be used.
    """
    folder = os.path.dirname(os.path.dirname(dataset.pipeline[0].urls[0]))
    names, templates = dataset.classes, dataset.templates
    check_classnames(names, names_from or f"{folder}/{CLASSES_FILE}")
    templates_from = templates_from or f"{folder}/{TEMPLATES_FILE}"
    if isinstance(templates, Mapping):
        for name in names:
            texts = templates.get(name)
            if not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
                fault = f"no list of prompts, but {texts!r}, for the class {name!r}"
                raise ValueError(f"{fault}; correct {templates_from}")
        return [tuple(templates[name]) for name in names]
    templates[:] = check_templates(templates, templates_from)
    return [tuple(template.format(c=name) for template in templates) for name in names]


def read_templates(source: str) -> list[str]:
    """Templates with ``{c}`` for the name: "simple", "imagenet" (open_clip's 80), or a file's.

    The file is UTF-8 with one template a line and ``{}`` or ``{c}`` where the name goes.

    Raises:
        ValueError: naming the line, if it is no template.
        FileNotFoundError: if there is no such file.
    """
    if source == "simple":
        return [SIMPLE]
    if source == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"--templates {source}: no such file; give simple, imagenet or a file with one template "
            "a line"
        )
    lines = path.read_text(encoding="utf-8").replace("{}", "{c}").splitlines()
    return check_templates(lines, f"--templates {source}")


def check_templates(lines: Sequence[Any], where: str) -> list[str]:
    """The templates in ``lines``, without the blank ones.

    Raises:
        ValueError: naming ``where`` and the line without ``{c}`` or with another field; if none is left.
    """
    for number, line in enumerate(lines, 1):
        if fault := _fault(line):
            raise ValueError(
                f"{where}, line {number}: {line!r} is no template ({fault}); write {{c}} where the "
                "class name goes, and {{ or }} for a brace"
            )
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"{where} is empty; give one template a line, e.g. {SIMPLE!r}")
    return found


def _fault(template: Any) -> str | None:
    if not isinstance(template, str):
        return "no text"
    try:
        fields = [field for _, *field in Formatter().parse(template) if field[0] is not None]
    except ValueError as error:
        return str(error)
    if any(field != ["c", "", None] for field in fields):
        return "another field than {c}"
    return None if fields or not template.strip() else "no {c} in it"


def check_classnames(names: Sequence[str], where: str) -> None:
    """Raise ValueError for an empty name, with its place in ``where``; warn about repeated names."""
    for number, name in enumerate(names, 1):
        if not _is_text(name):
            raise ValueError(
                f"{where}, line {number}: empty class name; every line is a class, so name it or "
                "remove the line and its column of the label vectors"
            )
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        logging.warning(
            f"{where}: {len(repeated)} names stand for several classes, e.g. {repeated[0]!r}; such "
            "classes always score the same, and F@K takes the first of them first"
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def faults(folder: Path) -> list[tuple[str, str, str]]:
    """What evaluation would refuse of a webdataset's text files: (file, "", fault)."""
    found = []
    for name, check in ((CLASSES_FILE, check_classnames), (TEMPLATES_FILE, check_templates)):
        if (path := folder / name).is_file():
            try:
                check(path.read_text(encoding="utf-8").splitlines(), name)
            except ValueError as error:
                found.append((str(path), "", str(error)))
    return found
