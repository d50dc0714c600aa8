"""Samples of webdataset shards as stock loaders read them, and what is wrong with one.

The one reader of tars. It imports neither torch nor webdataset, which imports torch.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import tarfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

IMAGES = ("webp", "png", "jpg", "jpeg")  # the first that a sample has, for clip_benchmark
TRAINING_IMAGES = ("jpg", "png", "jpeg", "webp")  # for open_clip
CAPTIONS_LOOKED_AT = 2000  # captions that are looked at before training
_KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's
_SKIPPED = re.compile(r"__[^/]*__($|/)")  # names of webdataset's own, which are no samples

# How files end of which nothing was cut off.
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_LONGEST_END = max(map(len, _ENDS.values()))


class Fault(NamedTuple):
    """A fault of ``file``, or of a sample in it; ``text`` says what it is and how to mend it."""

    file: str
    sample: str
    text: str

    def __str__(self) -> str:
        sample = f"sample {self.sample}: " if self.sample else ""
        return f"{self.file}: {sample}{self.text}"


class SampleError(ValueError):
    """A sample that loaders would refuse or misread; the message is a fault's text."""


class Member(tarfile.TarInfo):
    """tarfile takes a header cut short or garbled for the end; this one notes the true end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Member:
        """As tarfile has it."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            tar.ended = True
            raise


def samples(
    path: str | os.PathLike[str],
    *,
    strict: bool = False,
    file: IO[bytes] | None = None,
    contents: bool | Collection[str] = True,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, suffix -> content) of each group of consecutive files with one key.

    The tar may be compressed, and is read from ``file`` if that is given. A suffix that comes again
    begins another sample, as in training, or is an error if ``strict``, as for clip_benchmark. Without
    ``contents``, but for suffixes among them, they are empty, and the disk is not read where they are.
    OSError with a fault's text if the tar cannot be read to its end.
    """
    try:
        mode = "r|*" if contents is True else "r:*"
        with tarfile.open(path, mode, file, tarinfo=Member) as tar:
            yield from _grouped(tar, strict, contents)
    except (tarfile.TarError, EOFError) as error:
        fault = f"damaged or cut short ({error}); copy or build the shard again"
        raise OSError(f"cannot be read to its end: {fault}") from error


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar opened with ``tarinfo=Member``; TarError if it does not end as a tar does."""
    # Of a stream without members Python 3.10 cannot be asked again what opening it has seen.
    while not getattr(tar, "ended", False) and (member := tar.next()) is not None:
        tar.members.clear()  # or it keeps all
        yield member
    if not getattr(tar, "ended", False):
        raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")


def _grouped(
    tar: tarfile.TarFile, strict: bool, contents: bool | Collection[str]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    current: str | None = None
    files: dict[str, bytes] = {}
    damage: Exception | None = None
    try:
        for member in members(tar):
            match = _KEY_AND_SUFFIX.match(member.name)
            if match is None or not member.isreg() or _SKIPPED.match(member.name):
                continue
            key, suffix = match[1], match[2].lower()
            if strict and key == current and suffix in files:
                fault = f"{member.name} comes twice in a row, where clip_benchmark stops"
                raise OSError(f"cannot be read to its end: {fault}; give each sample its own name")
            if key != current or suffix in files:
                if current is not None:
                    yield current, files
                current, files = key, {}
            wanted = contents is True or (contents and suffix in contents)
            files[suffix] = tar.extractfile(member).read() if wanted else b""
    except (tarfile.TarError, EOFError) as error:
        damage = error
    if current is not None and not (strict and damage):  # in training it is what there is of it
        yield current, files
    if damage is not None:
        raise damage
    while behind := tar.fileobj.read(1 << 20):
        if behind.strip(b"\0"):
            text = "behind its end more follows, another tar perhaps, which is not read"
            raise tarfile.ReadError(text)


def first_captions(shards: Iterable[str]) -> Iterator[str]:
    """:data:`CAPTIONS_LOOKED_AT` captions of each folder's first shards, of those that are on a disk."""
    for _, group in itertools.groupby(filter(os.path.isfile, shards), os.path.dirname):
        yield from itertools.islice(
            itertools.chain.from_iterable(map(_captions, group)), CAPTIONS_LOOKED_AT
        )


def _captions(shard: str) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for _, files in samples(shard, contents=("txt",)):
            with contextlib.suppress(SampleError):
                yield caption(files)


def caption(files: Mapping[str, bytes]) -> str:
    """The text of a sample; SampleError if there is none."""
    if "txt" not in files:
        raise SampleError("no txt with its caption")
    try:
        text = files["txt"].decode()
    except UnicodeDecodeError:
        raise SampleError("caption is not UTF-8") from None
    if not text.strip():
        raise SampleError("empty caption")
    return text


def labels(files: Mapping[str, bytes], suffix: str, classes: int | None) -> np.ndarray:
    """The true classes, from an ``npy`` of zeros and ones or a ``cls`` with one class's number.

    ``classes`` is how many there are, if it is known. SampleError if evaluation cannot use the labels.
    """
    if suffix not in files:
        if suffix == "npy":
            raise SampleError("no npy with its label vector")
        multilabel = "; as it has npy, write multilabel into dataset_type.txt"
        raise SampleError(f"no cls with its label{multilabel if 'npy' in files else ''}")
    if suffix == "cls":
        content = files["cls"].strip()
        if not re.fullmatch(rb"\d{1,9}", content) or int(content) >= (classes or 1e9):
            of = f"none of the {classes} classes" if classes is not None else "no class's number"
            raise SampleError(f"its cls, {content[:20]!r}, is {of}")
        return np.array([int(content)], np.int32)
    try:
        vector = np.lib.format.read_array(io.BytesIO(files["npy"]), allow_pickle=False)
    except Exception as error:  # NumPy raises many types on damaged bytes
        raise SampleError(f"the npy cannot be read (unreadable labels: {error})") from error
    if vector.ndim != 1 or classes not in (None, len(vector)):
        due = f"there are {classes} class names; each needs an entry" if classes else "1-D is due"
        raise SampleError(f"label vector of shape {vector.shape}, but {due}")
    if vector.dtype.kind not in "biuf":
        raise SampleError(f"label vector of {vector.dtype}, where numbers are due")
    positive = vector.nonzero()[0]
    wrong = vector[positive][vector[positive] != 1]
    if len(wrong):
        raise SampleError(f"label vector with values other than 0 and 1, e.g. {wrong[0]}")
    return positive.astype(np.int32)


def image_file(files: Mapping[str, bytes], order: Sequence[str] = IMAGES) -> bytes:
    """The content of the image that a loader takes; SampleError if there is none."""
    for suffix in order:
        if suffix in files:
            return files[suffix]
    raise SampleError("no image (jpg, png, webp, jpeg) among its files")


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Pillow's exceptions, which are of nearly every type, as SampleError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on EXIF, palettes and sizes, of no consequence here
            yield
    except MemoryError:
        raise
    except Exception as error:
        text = str(error) or type(error).__name__
        if text.startswith("cannot identify image file"):
            text = "not an image that Pillow can read"
        raise SampleError(f"unreadable image: {text}") from error


def opened(content: bytes | IO[bytes], *, whole: bool = False) -> Image.Image:
    """The image with its header read, or the ``whole``; SampleError if Pillow cannot read it."""
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    if not file.seek(0, io.SEEK_END):
        raise SampleError("unreadable image: empty file")
    file.seek(0)
    with readable():
        image = Image.open(file)
        if whole:
            image.load()
        return image


def rgb(image: Image.Image) -> Image.Image:
    """An opened image as webdataset's ``pil`` handler decodes it; SampleError if that fails.

    No EXIF orientation is applied, and what has more than 8 bits is cut off, see ``check_range``.
    """
    with readable():
        image.load()
        return image.convert("RGB")


def check_range(image: Image.Image) -> None:
    """Raise SampleError if loaders would cut off what the image holds beyond 0 to 255."""
    if not image.mode.startswith(("I", "F")):
        return
    fault = f"16-bit or float image (mode {image.mode}), which loaders cut off at 0 and 255"
    raise SampleError(f"{fault}; scale it to 8 bits")


def check_image(content: bytes | IO[bytes]) -> None:
    """``opened`` and ``check_range``, and whether all of it is there: few images need to be decoded.

    Of a file on a disk head and end are read; of what is in memory a PNG's checksums are compared, too.
    """
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    file.seek(max(0, file.seek(0, io.SEEK_END) - _LONGEST_END))
    end = file.read()
    image = opened(file)
    check_range(image)
    if image.format not in _ENDS or not end.endswith(_ENDS[image.format]):
        rgb(image)
    elif image.format == "PNG" and isinstance(content, bytes):
        with readable():
            image.verify()
