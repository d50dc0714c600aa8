"""Class names and templates, refused alike on every way in, and their prompts. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from otter_openclip.shards.read import Fault
from otter_openclip.shards.write import TEMPLATES_FILE

SIMPLE = "a photo of {c}."


def class_prompts(dataset: Any, templates_file: str | None = None) -> list[tuple[str, ...]]:
    """Each class's prompts, of a webdataset as clip_benchmark opened it; see `check_prompts`.

    Its ``templates`` may be from another file than its own; blank ones are dropped from it.
    """
    folder, names = dataset.pipeline[0].urls[0].rsplit("/", 2)[0], dataset.classes
    where = templates_file or f"{folder}/{TEMPLATES_FILE}"
    dataset.templates = templates = check_prompts(dataset.templates, names, where)
    if isinstance(templates, Mapping):
        return [tuple(templates[name]) for name in names]
    return [tuple(template.format(c=name) for template in templates) for name in names]


def check_prompts(templates: Any, names: Sequence[str], where: str) -> Any:
    """``templates``: a list with ``{c}`` for the name, here without blank ones, or each name's prompts.

    ValueError names ``where``, and the line or the class, of what cannot be used.
    """
    if isinstance(templates, list):
        for fault in template_faults(templates):
            raise ValueError(str(Fault(where, "", fault)))
        return [template.strip() for template in templates if template.strip()]
    if not isinstance(templates, Mapping):
        raise ValueError(
            f"{where}: {templates!r} is neither a list of templates nor an object of lists"
        )
    for name in names:
        texts = templates.get(name)
        if not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
            fault = f"no list of prompts, but {texts!r}, for the class {name!r}"
            raise ValueError(f"{fault}; correct {where}")
    return templates


def read_templates(source: str) -> list[str]:
    """Templates with ``{c}`` for the name: "simple", "imagenet" (open_clip's 80), or a file's.

    The file is UTF-8 with one template a line and ``{}`` or ``{c}`` where the name goes.
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
    return check_prompts(lines, (), f"--templates {source}")


def template_faults(lines: Sequence[Any]) -> Iterator[str]:
    """What is wrong with lines that are not blank: each needs ``{c}`` and no other field."""
    for number, line in enumerate(lines, 1):
        if fault := _template_fault(line):
            yield (
                f"line {number}: {line!r} is no template ({fault}); write {{c}} where the class name "
                "goes, and {{ or }} for a brace"
            )
    if not any(map(_is_text, lines)):
        yield f"is empty; give one template a line, e.g. {SIMPLE!r}"


def _template_fault(template: Any) -> str | None:
    if not isinstance(template, str):
        return "no text"
    try:
        made = template.format(c="\0")
    except (ValueError, LookupError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if "\0" in made or not template.strip() else "no {c} in it"


def name_faults(names: Sequence[Any]) -> Iterator[str]:
    """What is wrong with class names, as lines of a file."""
    for number, name in enumerate(names, 1):
        if not _is_text(name):
            yield (
                f"line {number}: empty class name; every line is a class, so name it or remove the line "
                "and its column of the label vectors"
            )
        elif line_break := re.search("[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]", name):
            yield (
                f"line {number}: {name!r} holds a line break (U+{ord(line_break[0]):04X}), where "
                "clip_benchmark takes it for two classes; write a space"
            )


def repeated_names(names: Sequence[str]) -> str | None:
    """A remark on names that stand for several classes, if there are any."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if not repeated:
        return None
    return (
        f"{len(repeated)} names stand for several classes, e.g. {repeated[0]!r}; such classes always "
        "score the same, and F@K takes the first of them first"
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
