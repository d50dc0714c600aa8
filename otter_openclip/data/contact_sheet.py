"""A picture of many small ones, with what belongs to each underneath."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from otter_openclip.files import written_whole
from otter_openclip.pages import THUMBNAIL, shortened

COLUMNS = 8


def draw(chosen: Sequence[tuple[Image.Image, str]], path: Path) -> None:
    """Draw the contact sheet: thumbnails with what belongs to them underneath.

    The suffix of ``path`` says the format, PNG if Pillow writes none of that suffix.
    """
    columns = min(COLUMNS, len(chosen))
    width, height = THUMBNAIL + 16, THUMBNAIL + 76
    sheet = Image.new("RGB", (columns * width, -(-len(chosen) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    write = partial(pen.multiline_text, fill="black", font=font, anchor="ma", align="center")
    for number, (picture, text) in enumerate(chosen):
        x, y = number % columns * width + width // 2, number // columns * height + THUMBNAIL + 4
        left, top = x - picture.width // 2, y - picture.height
        sheet.paste(picture, (left, top))
        frame = (left - 1, top - 1, left + picture.width, y)  # or white ones would not show
        pen.rectangle(frame, outline="lightgrey")
        write((x, y + 4), "\n".join(textwrap.wrap(shortened(text, 84), 22)))
    with written_whole(path) as file:
        sheet.save(file, Image.registered_extensions().get(path.suffix.lower(), "PNG"))
