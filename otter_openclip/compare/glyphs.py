"""The glyphs of the text fonts that matplotlib ships, with their Unicode names."""

from __future__ import annotations

import functools
import unicodedata
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

SIZE = 112  # that of the image tower, so that nothing is resized
FAMILIES = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")


class Glyph(NamedTuple):
    """One character in one face."""

    face: str
    character: str

    @property
    def name(self) -> str:
        """Unicode name in lower case, e.g. ``greek small letter alpha``."""
        return unicodedata.name(self.character).lower()


def faces() -> list[str]:
    """Names of the 12 DejaVu and 4 STIX faces, sorted."""
    folder = _folder()
    return sorted(
        path.stem
        for path in folder.glob("*.ttf")
        if path.stem.split("-")[0] in FAMILIES or path.stem.startswith("STIXGeneral")
    )


def characters(face: str) -> list[str]:
    """Characters of ``face`` that have a Unicode name, in code-point order."""
    codes = sorted(FT2Font(str(_folder() / f"{face}.ttf")).get_charmap())
    return [chr(code) for code in codes if unicodedata.name(chr(code), "")]


def render(glyph: Glyph) -> Image.Image | None:
    """The glyph, black on white, centred in a square RGB picture of ``SIZE`` pixels; None if blank."""
    font = _font(glyph.face)
    left, top, right, bottom = font.getbbox(glyph.character)
    if right <= left or bottom <= top:
        return None
    image = Image.new("L", (SIZE, SIZE), 255)
    x = (SIZE - (right - left)) / 2 - left
    y = (SIZE - (bottom - top)) / 2 - top
    ImageDraw.Draw(image).text((x, y), glyph.character, fill=0, font=font)
    darkest, _ = image.getextrema()
    return image.convert("RGB") if darkest < 128 else None


def _folder() -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@functools.cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_folder() / f"{face}.ttf"), size=SIZE * 3 // 4)
