"""What a clip_benchmark webdataset must hold: one check for whoever inspects or evaluates one.

``Folder`` looks at the text files and counts the shards, which takes a moment. ``data inspect`` names
all faults of one; evaluation, alone and in training, refuses it for the first. Its samples are checked
as they are read. Imports no torch.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from otter_openclip.evaluation.prompts import SIMPLE, name_faults, repeated_names, template_faults
from otter_openclip.shards.read import Fault
from otter_openclip.shards.write import (
    CLASSES_FILE,
    COUNT_FILE,
    SIZES_FILE,
    TEMPLATES_FILE,
    TYPE_FILE,
)

# What clip_benchmark reads of each sample beside its image; it takes any other type for classification.
_SUFFIXES = {"multilabel": "npy", "retrieval": "txt", "classification": "cls", "": "cls"}


class Folder:
    """The text files of a clip_benchmark webdataset, with all that is wrong with them.

    Attributes:
        suffix: of the file with a sample's labels, ``npy`` or ``cls``, or captions, ``txt``.
        names: of classes, or None if they are not looked at or cannot be read.
        shards: that are counted and exist.
        faults: for which evaluation refuses the folder.
        remarks: what it only warns about.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "test",
        *,
        names: bool = True,
        templates: bool = True,
    ) -> None:
        """Read the files of ``root``.

        ``names`` and ``templates`` say whether a folder that is not for retrieval must bring its own.
        """
        self.root, self.split = Path(root), split
        self.faults: list[Fault] = []
        self.remarks: list[Fault] = []
        self.suffix = self._suffix()
        self.shards = self._shards()
        self.names: list[str] | None = None
        if names and self.suffix != "txt":
            self._names()
        if templates and self.suffix != "txt":
            text = self._text(TEMPLATES_FILE, f"write {SIMPLE!r} into it")
            if text is not None:
                self._fault(TEMPLATES_FILE, *template_faults(text.splitlines()))

    def _fault(self, name: str, *texts: str) -> None:
        self.faults += [Fault(str(self.root / name), "", text) for text in texts]

    def _text(self, name: str, fix: str) -> str | None:
        """A file's text, or None with a fault."""
        path = self.root / name
        if not path.is_file():
            self._fault(name, f"is missing; {fix}")
            return None
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            self._fault(name, f"cannot be read as UTF-8 text ({error}); save it as such")
            return None
        if text.startswith("\ufeff"):
            self._fault(name, "line 1 begins with a byte order mark; save it as UTF-8 without one")
        return text.removeprefix("\ufeff")

    def _suffix(self) -> str:
        if not (self.root / TYPE_FILE).exists():
            return "cls"
        kind = (self._text(TYPE_FILE, "") or "").strip().lower()
        if kind not in _SUFFIXES:
            known = "multilabel, retrieval or classification"
            self._fault(TYPE_FILE, f"{kind!r} is no type of data set; write {known}")
        return _SUFFIXES.get(kind, "cls")

    def _shards(self) -> list[Path]:
        folder, name = self.root / self.split, f"{self.split}/{COUNT_FILE}"
        text = self._text(name, "give a folder that otter-openclip data built, and its split")
        if text is None:
            return []
        try:
            count = int(text)
        except ValueError:
            count = 0
        if count < 1:
            fault = f"{text.strip()[:40]!r} is no number of shards; write how many there are"
            self._fault(name, fault)
            return []
        tars = {path.stem for path in folder.glob("*.tar")}
        numbers = sorted(int(stem) for stem in tars if re.fullmatch("0|[1-9][0-9]*", stem))
        counted = [number for number in numbers if number < count]
        if missing := count - len(counted):
            first = next(number for number in range(count) if str(number) not in tars)
            text = f"{missing} of {count} shards are missing, first {folder / f'{first}.tar'}"
            text += f" (counted in {COUNT_FILE} but gone); restore them or correct the number"
            self._fault(name, text)
        if further := numbers[len(counted) :]:
            text = f"says {count}, so {len(further)} further shards are not read, first {further[0]}.tar"
            self.remarks.append(Fault(str(self.root / name), "", text))
        return [folder / f"{number}.tar" for number in counted]

    def _names(self) -> None:
        text = self._text(CLASSES_FILE, "write one class a line into it")
        if text is None:
            return
        lines = text.removesuffix("\n").split("\n")  # clip_benchmark also splits at other breaks
        self._fault(CLASSES_FILE, *name_faults(lines))
        self.names = [line.strip() for line in lines]
        if remark := repeated_names(self.names):
            self.remarks.append(Fault(str(self.root / CLASSES_FILE), "", remark))

    @property
    def classes(self) -> int | None:
        """Number of class names, if there are any."""
        return None if self.names is None else len(self.names)


def check_webdataset(
    root: str,
    split: str = "test",
    *,
    names: bool = True,
    templates: bool = True,
    flag: str = "--dataset_root",
) -> Folder:
    """Raise ValueError for the first fault of the webdataset ``root``, given by ``flag``; log remarks.

    Its samples are not read. ``split`` is the folder in it with the shards; ``names`` and ``templates``
    say whether it must bring its own. A set for retrieval has neither, and will not do for ``names``.
    """
    folder = Folder(root, split, names=names, templates=templates)
    for fault in folder.faults:
        raise ValueError(f"{flag} {root} cannot be used: {fault}")
    if names and folder.suffix == "txt":
        raise ValueError(f"{flag} {root} is for retrieval by its {TYPE_FILE}; labels are needed")
    for remark in folder.remarks:
        logging.warning(str(remark))
    return folder


def is_evaluation(folder: Path) -> bool:
    """Whether the shards in ``folder`` are the split of an evaluation set, not of training pairs."""
    if (folder / COUNT_FILE).exists():
        return True
    files = (CLASSES_FILE, TEMPLATES_FILE, TYPE_FILE)
    beside = any((folder.parent / name).exists() for name in files)
    return beside and not (folder / SIZES_FILE).exists()
