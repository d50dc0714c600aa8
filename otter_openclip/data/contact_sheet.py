"""A picture of many small ones, with what belongs to each underneath."""

from __future__ import annotations

import io
import logging
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from otter_openclip.evaluation.validator import Folder
from otter_openclip.files import written_whole

THUMBNAIL = 160
COLUMNS = 8
FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf", "")


def draw(chosen: Sequence[tuple[int, bytes, Any, Folder | None]], path: Path) -> None:
    """Draw the contact sheet: thumbnails with what belongs to them underneath."""
    columns = min(COLUMNS, len(chosen))
    width, height = THUMBNAIL + 16, THUMBNAIL + 76
    sheet = Image.new("RGB", (columns * width, -(-len(chosen) // columns) * height), "white")
    font = _font(12)
    pen = ImageDraw.Draw(sheet)
    write = partial(pen.multiline_text, fill="black", font=font, anchor="ma", align="center")
    for number, (_, png, beside, folder) in enumerate(chosen):
        picture = Image.open(io.BytesIO(png))
        x, y = number % columns * width + width // 2, number // columns * height + THUMBNAIL + 4
        left, top = x - picture.width // 2, y - picture.height
        sheet.paste(picture, (left, top))
        frame = (left - 1, top - 1, left + picture.width, y)  # or white ones would not show
        pen.rectangle(frame, outline="lightgrey")
        if isinstance(beside, list):
            names = folder and folder.names
            beside = "; ".join(names[label] if names else str(label) for label in beside)
        text = textwrap.shorten(beside or "", 84, placeholder=" …")
        write((x, y + 4), "\n".join(textwrap.wrap(text, 22)))
    with written_whole(path) as file:
        sheet.save(file, Image.registered_extensions().get(path.suffix.lower(), "PNG"))


def _font(size: int) -> Any:
    """DejaVu, which knows more alphabets than Pillow's own font, where matplotlib brings it."""
    try:
        from matplotlib import get_data_path
    except ImportError:
        logging.warning(
            "The contact sheet's font has Latin letters only; for more alphabets: "
            "pip install 'otter-openclip[plots]'"
        )
        return ImageFont.load_default(size)
    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
