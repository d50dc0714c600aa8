"""Class names and templates, refused alike on every way in, and their prompts. Imports no torch."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from otter_openclip.evaluation.datasets import CLASSES_FILE, TEMPLATES_FILE

SIMPLE = "a photo of {c}."


def class_prompts(
    dataset: Any, *, names_from: str | None = None, templates_from: str | None = None
) -> list[tuple[str, ...]]:
    """Each class's prompts, of a webdataset as clip_benchmark opened it; blank templates are dropped.

    Args:
        dataset: its ``classes`` are names, its ``templates`` a list with ``{c}`` for the name, or a
            dict of each name's prompts.
        names_from: the file that the names are from, if not the dataset's own.
        templates_from: the file that the templates are from, if not the dataset's own.

    Raises:
        ValueError: naming the file and the line of what cannot be used.
    """
    folder = os.path.dirname(os.path.dirname(dataset.pipeline[0].urls[0]))
    check_classnames(dataset.classes, names_from or f"{folder}/{CLASSES_FILE}")
    templates_from = templates_from or f"{folder}/{TEMPLATES_FILE}"
    if isinstance(dataset.templates, list):
        dataset.templates[:] = check_templates(dataset.templates, templates_from)
    try:
        return make_prompts(dataset.classes, dataset.templates)
    except ValueError as error:
        raise ValueError(f"{error}; correct {templates_from}") from None


def make_prompts(
    names: Sequence[str], templates: Sequence[str] | Mapping[str, Sequence[str]]
) -> list[tuple[str, ...]]:
    """Each class's prompts: ``templates`` filled in, or those it maps the name to.

    Raises:
        ValueError: if a name has no prompts, or a template another place than ``{c}``.
    """
    if isinstance(templates, Mapping):
        for name in names:
            texts = templates.get(name)
            if not isinstance(texts, list | tuple) or not texts or not all(map(_is_text, texts)):
                raise ValueError(f"no list of prompts, but {texts!r}, for the class {name!r}")
        return [tuple(templates[name]) for name in names]
    templates = check_templates(templates, "templates")
    return [tuple(template.format(c=name) for template in templates) for name in names]


def read_templates(source: str) -> list[str]:
    """Templates with ``{c}`` for the class name.

    Args:
        source: "simple" (``a photo of {c}.``), "imagenet" (open_clip's 80), or a UTF-8 file with one
            template a line and ``{}`` or ``{c}`` where the name goes.

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
        ValueError: naming ``where`` and the line, unless each has ``{c}`` in it and no other field, or
            if there are none.
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
