"""What the demo trains and tests on, in webdataset form: glyphs, or the user's own pairs."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset
from open_clip_train.data import filter_no_caption_or_no_image, tarfile_to_samples_nothrow
from PIL import Image
from tqdm import tqdm

from otter_openclip.compare.glyphs import Glyph, characters, faces, render

HELD_OUT_FACE = "DejaVuSerif-Italic"
SHARDS = 6


class Data(NamedTuple):
    """What a run trains and tests on: shards of pairs, clip_benchmark webdatasets by title."""

    shards: list[Path]
    pairs: int
    tests: dict[str, Path]


class Split(NamedTuple):
    """Which glyphs are trained on and tested on; pairs of a glyph and its picture.

    ``unseen_characters`` shares no character with ``train``; ``unseen_face`` no face. Neither has a
    picture that is pixel for pixel one of ``train``: faces of a family draw about a tenth of their
    characters alike (arrows, boxes, braille), which would test memory instead.
    """

    train: list[tuple[Glyph, Image.Image]]
    unseen_characters: list[tuple[Glyph, Image.Image]]
    unseen_face: list[tuple[Glyph, Image.Image]]


def split_glyphs(rng: random.Random, *, train: int, test: int) -> Split:
    """Draw ``train`` glyphs, and up to ``test`` for each of the two test sets."""
    by_face = {face: characters(face) for face in faces()}
    everything = sorted({c for listed in by_face.values() for c in listed})
    rng.shuffle(everything)
    held_out = set(everything[: len(everything) // 8])

    seen = [Glyph(f, c) for f, cs in by_face.items() for c in cs if c not in held_out]
    rng.shuffle(seen)
    training_glyphs = [glyph for glyph in seen if glyph.face != HELD_OUT_FACE]
    trained = _draw(training_glyphs, train, "training glyphs")

    unseen = [Glyph(f, c) for f, cs in by_face.items() for c in cs if c in held_out]
    rng.shuffle(unseen)
    # One picture of each character, in a face seen in training.
    first_of = {g.character: g for g in unseen if g.face != HELD_OUT_FACE}
    pictures = {image.tobytes() for _, image in trained}
    trained_characters = {glyph.character for glyph, _ in trained}
    in_new_face = [g for g in seen if g.face == HELD_OUT_FACE and g.character in trained_characters]
    return Split(
        train=trained,
        unseen_characters=_draw(first_of.values(), test, "unseen characters", without=pictures),
        unseen_face=_draw(in_new_face, test, "unseen face", without=pictures),
    )


def _draw(
    glyphs: Iterable[Glyph], count: int, what: str, without: Collection[bytes] = ()
) -> list[tuple[Glyph, Image.Image]]:
    drawn = []
    with tqdm(total=count, desc=f"Rendering {what}", unit="glyph", leave=False) as bar:
        for glyph in glyphs:
            if len(drawn) == count:
                break
            image = render(glyph)
            if image is not None and image.tobytes() not in without:
                drawn.append((glyph, image))
                bar.update()
    return drawn


def make_glyphs(folder: Path, seed: int, *, pairs: int, test: int) -> Data:
    """Draw, caption and write them into ``folder``."""
    rng = random.Random(seed)
    split = split_glyphs(rng, train=pairs, test=test)
    write_training_shards(split.train, folder / "train", rng)
    tests = {}
    for name in ("unseen_characters", "unseen_face"):
        tests[name.replace("_", " ")] = folder / name
        write_test_set(getattr(split, name), folder / name)
    return Data(sorted((folder / "train").glob("*.tar")), len(split.train), tests)


def find_pairs(data: str, test: str, *, least: int, most: int) -> Data:
    """The shards in the folder ``data``, as many as ``most`` pairs need, and the test set's folder.

    Raises:
        ValueError: if ``data`` has no shards, or fewer than ``least`` pairs. ``test`` is not opened.
    """
    test_set = Path(test).resolve()
    every = sorted(Path(data).resolve().glob("*.tar"), key=lambda path: (len(path.name), path.name))
    if not every:
        raise ValueError(
            f"--data {data}: no such folder, or no .tar in it; otter-openclip data makes such shards"
        )
    shards, pairs = [], 0
    for shard in tqdm(every, "Counting pairs", unit="shard", leave=False):
        samples = tarfile_to_samples_nothrow(iter([{"url": str(shard)}]))  # open_clip's own reading
        pairs += sum(map(filter_no_caption_or_no_image, samples))
        shards.append(shard)
        if pairs >= most:
            break
    if pairs < least:
        raise ValueError(
            f"--data {data}: {pairs} pairs of an image (jpg, png, jpeg, webp) and a caption (txt) in "
            f"{len(every)} shards are fewer than a batch of {least}"
        )
    return Data(shards, pairs, {f"{test_set.parent.name}/{test_set.name}": test_set})


def thin(name: str, rng: random.Random) -> str:
    """Keep a random half of a name's words, in order, at least one."""
    words = name.split()
    chosen = [word for word in words if rng.random() < 0.5]
    return " ".join(chosen) if chosen else rng.choice(words)


def write_training_shards(
    glyphs: Sequence[tuple[Glyph, Image.Image]], folder: Path, rng: random.Random
) -> None:
    """Write ``folder/0000N.tar`` (png + txt) and ``sizes.json``, from which open_clip reads the size."""
    folder.mkdir(parents=True)
    sizes = {}
    for shard in range(SHARDS):
        part = glyphs[shard::SHARDS]
        name = f"{shard:05d}.tar"
        samples = (
            {"png": png(image), "txt": thin(glyph.name, rng).encode()} for glyph, image in part
        )
        write_tar(folder / name, samples)
        sizes[name] = len(part)
    (folder / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")


def write_test_set(glyphs: Sequence[tuple[Glyph, Image.Image]], folder: Path) -> None:
    """Write a multi-label clip_benchmark webdataset whose classes are the full names."""
    (folder / "test").mkdir(parents=True)
    classes = sorted({glyph.name for glyph, _ in glyphs})
    labels = np.eye(len(classes), dtype=np.uint8)
    samples = (
        {"png": png(image), "npy": npy(labels[classes.index(glyph.name)])}
        for glyph, image in glyphs
    )
    write_tar(folder / "test" / "0.tar", samples)
    (folder / "test" / "nshards.txt").write_text("1", encoding="utf-8")
    (folder / "classnames.txt").write_text("\n".join(classes), encoding="utf-8")
    (folder / "zeroshot_classification_templates.txt").write_text("{c}", encoding="utf-8")
    (folder / "dataset_type.txt").write_text("multilabel", encoding="utf-8")


def png(image: Image.Image) -> bytes:
    """PNG file content."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    """NPY file content."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_tar(path: Path, samples: Iterable[dict[str, bytes]]) -> None:
    """Write samples (suffix -> content) as a webdataset shard."""
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for number, sample in enumerate(samples):
            tar.write({"__key__": f"{number:06d}", **sample})
