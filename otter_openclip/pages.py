"""What the pages that commands write have in common: one file, no network, small pictures."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

THUMBNAIL = 160  # pixels along the longer side
SHOWN = 24  # pairs in each list of a page
_CAPTION = 280  # characters


def templates(module: str) -> Environment:
    """The templates beside the file of a ``module``, which extend ``page.jinja``; values are escaped."""
    return Environment(
        loader=FileSystemLoader([Path(module).parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def shortened(text: str, most: int = _CAPTION) -> str:
    """A text on one line, cut off at so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def thumbnail(image: Image.Image) -> bytes:
    """A small JPEG of an image."""
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer := io.BytesIO(), "JPEG", quality=78)
    return buffer.getvalue()


def address(jpeg: bytes) -> str:
    """A JPEG as the address of an image in a page."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
