"""What a clip_benchmark webdataset must hold: one check for whoever inspects or evaluates one.

``inspect`` names all that is wrong with a folder. Evaluation, alone and in training, refuses it for the
first of these before anything is loaded. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from otter_openclip.evaluation.prompts import (
    CLASSES_FILE,
    SIMPLE,
    TEMPLATES_FILE,
    name_faults,
    repeated_names,
    template_faults,
)
from otter_openclip.shards import read as shard_samples
from otter_openclip.shards.faults import Fault, SampleError

TYPE_FILE = "dataset_type.txt"
COUNT_FILE = "nshards.txt"
SIZES_FILE = "sizes.json"  # open_clip's, beside shards of training pairs
# What clip_benchmark reads of each sample beside its image; it takes any other type for classification.
_SUFFIXES = {"multilabel": "npy", "retrieval": "txt", "classification": "cls", "": "cls"}
_HOLDS = {"npy": "label vectors", "cls": "single labels", "txt": "captions"}


class Folder:
    """The text files of a clip_benchmark webdataset, with all that is wrong with them.

    Attributes:
        suffix: of the file with a sample's labels, ``npy`` or ``cls``, or captions, ``txt``.
        names: of classes, or None if they are not looked at or cannot be read.
        shards: that are counted and there.
        faults: for which evaluation refuses the folder.
        remarks: what it only warns about.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "test",
        *,
        names: bool | None = None,
        templates: bool | None = None,
        of_eval: bool = False,
    ) -> None:
        """Read the files of ``root``.

        ``names`` and ``templates`` say whether the folder must bring its own; default: unless it is for
        retrieval. ``of_eval`` names the flags of ``eval`` in what is said of missing files.
        """
        self.root, self.split, self._of_eval = Path(root), split, of_eval
        self.faults: list[Fault] = []
        self.remarks: list[Fault] = []
        self.suffix = self._suffix()
        self.shards = self._shards()
        labelled = self.suffix != "txt"
        self.names: list[str] | None = None
        if labelled if names is None else names:
            self._names()
        if labelled if templates is None else templates:
            fix = f"write {SIMPLE!r} into it"
            if (text := self._text(TEMPLATES_FILE, fix, "pass --templates")) is not None:
                self._fault(TEMPLATES_FILE, *template_faults(text.splitlines()))

    def _fault(self, name: str, *texts: str) -> None:
        self.faults += [Fault(str(self.root / name), "", text) for text in texts]

    def _text(self, name: str, fix: str, or_else: str) -> str | None:
        """A file's text, or None with a fault."""
        path = self.root / name
        if not path.is_file():
            self._fault(name, f"is missing; {f'{or_else}, or ' if self._of_eval else ''}{fix}")
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
        kind = (self._text(TYPE_FILE, "", "") or "").strip().lower()
        if kind not in _SUFFIXES:
            known = "multilabel, retrieval or classification"
            self._fault(TYPE_FILE, f"{kind!r} is no type of data set; write {known}")
        return _SUFFIXES.get(kind, "cls")

    def _shards(self) -> list[Path]:
        folder, name = self.root / self.split, f"{self.split}/{COUNT_FILE}"
        text = self._text(name, "otter-openclip data builds such folders", "correct --split")
        if text is None:
            return []
        try:
            count = int(text)
        except ValueError:
            count = 0
        if count < 1:
            self._fault(
                name, f"{text.strip()[:40]!r} is no number of shards; write how many there are"
            )
            return []
        stems = [path.stem for path in folder.glob("*.tar")]
        there = sorted(int(s) for s in stems if s.isdecimal() and s == str(int(s)))
        found = [n for n in there if n < count]
        if gone := count - len(found):
            first = next(n for n in range(count) if [n] != found[n : n + 1])
            self._fault(
                name,
                f"{gone} of {count} shards are missing, first {folder / f'{first}.tar'} (counted in "
                f"{COUNT_FILE} but gone); restore them or correct the number",
            )
        if more := len(there) - len(found):
            text = f"says {count}, so {more} further shards are not read, first {there[-more]}.tar"
            self.remarks.append(Fault(str(self.root / name), "", text))
        return [folder / f"{n}.tar" for n in found]

    def _names(self) -> None:
        text = self._text(CLASSES_FILE, "write one class a line", "pass --custom_classname_file")
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

    def sample_faults(self, *, progress: bool = False, may_be_cut: bool = False) -> Iterator[Fault]:
        """What is wrong with the samples: labels or captions, and images as far as their headers say.

        ``may_be_cut`` passes over images of which the end is missing.
        """
        count = 0
        with tqdm(desc="Checking samples", unit="sample", disable=not progress) as bar:
            for shard in self.shards:
                try:
                    for key, files in shard_samples.samples(shard, strict=True):
                        count += 1
                        bar.update()
                        try:
                            if self.suffix == "txt":
                                shard_samples.caption(files)
                            else:
                                shard_samples.labels(files, self.suffix, self.classes)
                            content = shard_samples.image_file(files)
                            shard_samples.check_image(content, may_be_cut=may_be_cut)
                        except SampleError as error:
                            yield Fault(str(shard), key, str(error))
                except OSError as error:
                    yield Fault(str(shard), "", str(error))
        yield from self.count_faults(count)

    def count_faults(self, samples: int) -> Iterator[Fault]:
        """The fault of a folder without samples, if that is all that is wrong with its shards."""
        if self.shards and not samples:
            text = f"no images in {len(self.shards)} shards, first {self.shards[0]}"
            yield Fault(str(self.root / self.split), "", text)


def check_webdataset(
    root: str,
    split: str = "test",
    *,
    names: bool = True,
    templates: bool = True,
    flag: str = "--dataset_root",
    kinds: Sequence[str] = ("npy", "cls"),
    samples: bool = True,
    progress: bool = True,
    may_be_cut: bool = False,
) -> Folder | None:
    """Raise ValueError for the first fault of the webdataset ``root``, given by ``flag``; log remarks.

    Whoever evaluates calls it before anything is loaded. For ``eval`` addresses are passed over.

    Args:
        root: the folder.
        split: the folder in it with the shards.
        names: whether it must bring its own class names.
        templates: likewise.
        flag: for the message.
        kinds: the suffixes of samples' labels or captions that will do.
        samples: whether to read all of them, as `Folder.sample_faults` does.
        progress: whether to show how far that is.
        may_be_cut: as there.
    """
    of_eval = flag == "--dataset_root"
    if of_eval and "://" in root:
        return None
    folder = Folder(root, split, names=names, templates=templates, of_eval=of_eval)
    for fault in folder.faults:
        what = "is no clip_benchmark webdataset of classes: " * fault.text.startswith("is missing")
        raise ValueError(f"{flag} {root} {what or 'cannot be used: '}{fault}")
    if folder.suffix not in kinds:
        holds, needs = _HOLDS[folder.suffix], " or ".join(_HOLDS[kind] for kind in kinds)
        raise ValueError(
            f"{flag} {root} is a set with {holds} by its {TYPE_FILE}; {needs} are needed"
        )
    for remark in folder.remarks:
        logging.warning(str(remark))
    if samples:
        found = folder.sample_faults(progress=progress, may_be_cut=may_be_cut)
        fault = next(found, None)
        found.close()  # ends the bar before anything is said
        if fault is not None:
            hint = "; or pass --load_truncated" if of_eval and "truncated" in fault.text else ""
            raise ValueError(f"{flag} {root} cannot be used: {fault}{hint}")
    return folder


def is_evaluation(folder: Path) -> bool:
    """Whether the shards in ``folder`` are the split of an evaluation set, not of training pairs."""
    if (folder / COUNT_FILE).exists():
        return True
    files = (CLASSES_FILE, TEMPLATES_FILE, TYPE_FILE)
    beside = any((folder.parent / name).exists() for name in files)
    return beside and not (folder / SIZES_FILE).exists()


def size_faults(folder: Path, counted: Mapping[str, int]) -> Iterator[Fault]:
    """What is wrong with a ``sizes.json``, by the samples ``counted`` in shards of its folder."""
    path = folder / SIZES_FILE
    if not path.exists():
        return
    try:
        sizes = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        yield Fault(str(path), "", f"cannot be read as JSON ({error}); write it again")
        return
    if not isinstance(sizes, dict):
        yield Fault(str(path), "", "is no object of shard names and numbers of samples")
        return
    for name, samples in counted.items():
        if (listed := sizes.get(name)) != samples:
            text = f"{samples} samples, where {SIZES_FILE} has {listed!r}"
            yield Fault(str(folder / name), "", text)
    for name in sizes.keys() - counted.keys():
        if not (folder / name).exists():
            yield Fault(str(folder / name), "", f"counted in {SIZES_FILE} but gone")
