"""Icons and the words of their names, of a font of QtAwesome, which is read without importing it."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from otter_openclip.cli import needs
from otter_openclip.compare.halves import write_labelled
from otter_openclip.shards.write import CLASSES_FILE, TEMPLATES_FILE, label_vector, write_shard

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


def find_fonts() -> Path:
    """The folder of QtAwesome's fonts.

    Raises:
        RuntimeError: if the package is missing, or a file is not the one that the demo was made for.
    """
    needs("qtawesome", "demo")
    spec = importlib.util.find_spec("qtawesome")
    folder = Path(spec.submodule_search_locations[0]) / "fonts"
    for name, expected in FILES.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise RuntimeError(
                f"{folder / name} is not the file the demo was made for; "
                "pip install 'otter-openclip[demo]' brings it"
            )
    return folder


def icons(folder: Path) -> list[tuple[str, str]]:
    """Each icon's character and its name's words, but for those of style."""
    names = {}
    for name, character in json.loads((folder / NAMES).read_text(encoding="utf-8")).items():
        words = name.replace("_", "-").split("-")
        while words and words[-1] in STYLES:
            words.pop()
        if words:
            names.setdefault(chr(int(character, 16)), " ".join(words))
    return list(names.items())


def picture(character: str, font: ImageFont.FreeTypeFont) -> bytes:
    """A character, black on white, as a PNG file."""
    image = Image.new("L", (SIZE, SIZE), 255)
    place = (SIZE / 2, SIZE / 2)
    ImageDraw.Draw(image).text(place, character, font=font, fill=0, anchor="mm")
    image.convert("RGB").save(content := io.BytesIO(), "PNG")
    return content.getvalue()


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
    pictures = [picture(character, font) for character, _ in pool[:pairs]]
    right = [name for _, name in pool[:pairs]]
    for folder_name, captions in (("right", right), ("shuffled", shuffled(right, SHUFFLED, rng))):
        (out / folder_name).mkdir(parents=True)
        samples = []
        for n, caption in enumerate(captions):
            key = f"{n:05d}{WRONG if caption != right[n] else ''}"
            samples.append((key, {"png": pictures[n], "txt": caption.encode()}))
        for shard in range(SHARDS):
            write_shard(out / folder_name / f"{shard:05d}.tar", samples[shard::SHARDS])
    classes = _classes([name for _, name in held_out], [name for _, name in pool])
    tested = []
    for character, name in held_out:
        if true := [n for n, word in enumerate(classes) if word in name.split()]:
            label = label_vector(true, len(classes))
            tested.append({"png": picture(character, font), "npy": label})
    texts = {CLASSES_FILE: "\n".join(classes), TEMPLATES_FILE: "an icon of {c}"}
    write_labelled(out / "test-icons", tested, texts)


def _classes(tested: Sequence[str], pool: Sequence[str]) -> list[str]:
    """Words that several of the test's names share, and of the pool's."""
    counts, known = (
        Counter(w for name in names for w in set(name.split())) for names in (tested, pool)
    )
    often = [word for word in counts if min(counts[word], known[word]) >= SHARED]
    return sorted(word for word in often if len(word) > 2 and not word.isdigit())
