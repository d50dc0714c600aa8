"""Icons and the words of their names, of a font of QtAwesome, which is read without importing it."""

from __future__ import annotations

import importlib.util
import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from otter_openclip.compare.demo_towers import INSTALL, check_file
from otter_openclip.shards.write import (
    CLASSES_FILE,
    COUNT_FILE,
    TEMPLATES_FILE,
    TYPE_FILE,
    write_shard,
)

FONT = "materialdesignicons6-webfont-6.9.96.ttf"
NAMES = "materialdesignicons6-webfont-charmap-6.9.96.json"
FILES = {  # checksums, as of the version that pyproject.toml names
    FONT: "be825c1294d3c4f046c8e496b18f8f0c7d2864e339c81bdab9297f17ffac1938",
    NAMES: "6317242191c4c889dec2c174f98dda0f309745d28c23c50a19bbbaf02df930a9",
}
# How it is drawn, at a name's end.
STYLES = "outline variant fill line bold thin light regular duotone solid alt".split()
SIZE, _GLYPH = 112, 88  # pixels
POOL = 6000  # icons that pairs are drawn from; those of the test are behind them
SHARDS = 3
SHARED = 3  # icons of the test, at least, that have a label
SHUFFLED, WRONG = 0.4, "w"  # of the captions; how keys of pairs end whose caption was


class Icon(NamedTuple):
    """A character of the font, and its name."""

    character: str
    name: str


def find_fonts() -> Path:
    """The folder of QtAwesome's fonts.

    Raises:
        RuntimeError: if the package is missing, or a file is not the one that the demo was made for.
    """
    spec = importlib.util.find_spec("qtawesome")
    if spec is None:
        raise RuntimeError(f"the demo's icons are in qtawesome, which is not installed: {INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "fonts"
    for name, digest in FILES.items():
        check_file(folder / name, digest)
    return folder


def icons(folder: Path) -> list[Icon]:
    """All icons, each once, under the words of their names but for those of style."""
    names = {}
    for name, character in json.loads((folder / NAMES).read_text()).items():
        words = name.replace("_", "-").split("-")
        while words and words[-1] in STYLES:
            words.pop()
        if words:
            names.setdefault(chr(int(character, 16)), " ".join(words))
    return [Icon(character, name) for character, name in names.items()]


def draw(icon: Icon, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Its picture, black on white."""
    image = Image.new("L", (SIZE, SIZE), 255)
    place = (SIZE / 2, SIZE / 2)
    ImageDraw.Draw(image).text(place, icon.character, font=font, fill=0, anchor="mm")
    return image.convert("RGB")


def shuffled(names: Sequence[str], share: float, rng: random.Random) -> list[str]:
    """The names, of which a share is of other icons."""
    places = rng.sample(range(len(names)), round(share * len(names)))
    captions = list(names)
    for place, other in zip(places, [*places[1:], *places[:1]], strict=True):
        captions[place] = names[other]
    return captions


def write_icons(folder: Path, out: Path, *, pairs: int, test: int) -> None:
    """Write a test set, ``test-icons``, and pairs: ``right`` and ``shuffled``."""
    rng, font = random.Random(0), ImageFont.truetype(str(folder / FONT), _GLYPH)
    every = icons(folder)
    rng.shuffle(every)
    pool, held_out = every[:POOL], every[POOL : POOL + test]
    pictures = [_png(draw(icon, font)) for icon in pool[:pairs]]
    right = [icon.name for icon in pool[:pairs]]
    for name, captions in (("right", right), ("shuffled", shuffled(right, SHUFFLED, rng))):
        (out / name).mkdir(parents=True)
        samples = [
            (f"{n:05d}{WRONG if captions[n] != right[n] else ''}", {"png": picture, "txt": text})
            for n, (picture, text) in enumerate(
                zip(pictures, map(str.encode, captions), strict=True)
            )
        ]
        for shard in range(SHARDS):
            write_shard(out / name / f"{shard:05d}.tar", samples[shard::SHARDS])
    _write_test(held_out, pool, font, out / "test-icons")


def _write_test(
    held_out: Sequence[Icon], pool: Sequence[Icon], font: ImageFont.FreeTypeFont, out: Path
) -> None:
    """A labelled webdataset; its classes are words that several of its names and of the pool's share."""
    tested, seen = (
        Counter(word for icon in each for word in set(icon.name.split()))
        for each in (held_out, pool)
    )
    classes = sorted(
        word
        for word, count in tested.items()
        if min(count, seen[word]) >= SHARED and len(word) > 2 and not word.isdigit()
    )
    samples = []
    for icon in held_out:
        label = np.array([word in icon.name.split() for word in classes], np.uint8)
        if label.any():
            np.save(content := io.BytesIO(), label)
            files = {"png": _png(draw(icon, font)), "npy": content.getvalue()}
            samples.append((f"{len(samples):05d}", files))
    (out / "test").mkdir(parents=True)
    write_shard(out / "test" / "0.tar", samples)
    texts = {CLASSES_FILE: "\n".join(classes), TEMPLATES_FILE: "an icon of {c}"}
    texts |= {TYPE_FILE: "multilabel", f"test/{COUNT_FILE}": "1"}
    for name, text in texts.items():
        (out / name).write_text(text + "\n")


def _png(image: Image.Image) -> bytes:
    image.save(content := io.BytesIO(), "PNG")
    return content.getvalue()
