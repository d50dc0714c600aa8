"""What stock loaders can read: the check, and the conversion of what they cannot.

open_clip's loaders give ``Image.convert("RGB")``: EXIF orientation is passed over, and pixels of more
than 8 bits a channel are cut at 255. So nothing is turned here either, and such pixels are scaled.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image

# PIL's name of a format -> suffix. clip_benchmark reads webp, png, jpg and jpeg; open_clip the same.
# MPO is a JPEG with further pictures behind it.
STOCK_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
JPEG_QUALITY = 95
_MIN_MAX = ((340, 341), (280, 281))  # TIFF's (S)MinSampleValue and (S)MaxSampleValue
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose mode I holds 0 to 65535


class UndecodableImageError(ValueError):
    """Pillow cannot read the image, or its pixels have no meaning in 8 bits."""


def decode(content: bytes) -> Image.Image:
    """The picture of a file's ``content`` with all its pixels read, in the file's own mode.

    Raises:
        UndecodableImageError: if PIL cannot open or load it, truncated files included.
    """
    if not content:
        raise UndecodableImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # EXIF, palette and size remarks of no consequence here
            image = Image.open(io.BytesIO(content))
            image.load()
            return image
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise nearly everything on broken files
        raise UndecodableImageError(_reason(error)) from error


def prepare(content: bytes, resize: int | None = None) -> tuple[str, bytes]:
    """The suffix and content to store for an image file's ``content``.

    JPEG, PNG and WebP stay byte for byte what they are, unless their shorter side exceeds ``resize``
    pixels; then they are scaled as torchvision's ``Resize(resize, BICUBIC)`` does. Other formats, and
    pixels of more than 8 bits (`eight_bits`), become PNG.

    Raises:
        UndecodableImageError: as `decode` and `eight_bits`.
    """
    image = decode(content)
    suffix = STOCK_FORMATS.get(image.format or "")
    if image.mode[0] in "IF":
        image, suffix = eight_bits(image), None
    large = resize is not None and min(image.size) > resize
    if suffix is not None and not large:
        return suffix, content
    if image.mode not in ("L", "RGB"):
        try:
            image = image.convert("RGB")
        except ValueError as error:
            raise UndecodableImageError(_reason(error)) from error
    if large:
        image = image.resize(resized(image.size, resize), Image.Resampling.BICUBIC)
    if suffix in ("jpg", "webp"):
        return "jpg", _encode(image, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "png", _encode(image, "PNG")


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of mode I;16, I or F as one of mode L: its stated range becomes 0 to 255.

    The range is that of TIFF's sample value tags, or else that of 16 bits.

    Raises:
        UndecodableImageError: if no range is stated, or a pixel is outside it.
    """
    tags, low, high = getattr(image, "tag_v2", {}), 0.0, 0.0
    for first, last in _MIN_MAX:
        if last in tags and not high > low:
            low, high = (float(np.max(tags.get(tag, 0))) for tag in (first, last))
    if not high > low and (image.mode.startswith("I;16") or image.format in _SIXTEEN_BITS):
        low, high = 0.0, 65535.0
    if not high > low:
        raise UndecodableImageError(f"{image.mode} pixels of no stated range; scale them to 8 bits")
    pixels = np.asarray(image, np.float64)
    if not (pixels >= low).all() or not (pixels <= high).all():
        raise UndecodableImageError(
            f"{image.mode} pixels outside the stated range of {low:g} to {high:g}"
        )
    return Image.fromarray(np.round((pixels - low) * (255 / (high - low))).astype(np.uint8))


def resized(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """(width, height) with the shorter side ``shorter``, the other rounded down as torchvision does."""
    width, height = size
    if width <= height:
        return shorter, max(1, int(shorter * height / width))
    return max(1, int(shorter * width / height)), shorter


def _encode(image: Image.Image, format_name: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def _reason(error: Exception) -> str:
    text = str(error)
    if text.startswith("cannot identify image file"):
        return "not an image that Pillow can read"
    return text or type(error).__name__
