"""What stock loaders can read: the check, and the conversion of what they cannot."""

from __future__ import annotations

import io
import warnings

from PIL import Image

# PIL's name of a format -> suffix. clip_benchmark reads webp, png, jpg and jpeg; open_clip the same.
# MPO is a JPEG with further pictures behind it.
STOCK_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
JPEG_QUALITY = 95


class UndecodableImageError(ValueError):
    """Pillow cannot read the image."""


def decode(content: bytes) -> tuple[Image.Image, str]:
    """Decode as webdataset's ``pil`` handler does for both stock consumers.

    Returns:
        The RGB image and PIL's name of the file's format.

    Raises:
        UndecodableImageError: if PIL cannot open, load or convert it, truncated files included.
    """
    if not content:
        raise UndecodableImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # EXIF, palette and size remarks of no consequence here
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                return image.convert("RGB"), image.format or ""
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise nearly everything on broken files
        raise UndecodableImageError(_reason(error)) from error


def prepare(content: bytes, resize: int | None = None) -> tuple[str, bytes]:
    """The suffix and content to store for an image file's ``content``.

    JPEG, PNG and WebP stay byte for byte what they are, unless their shorter side exceeds ``resize``
    pixels; then they are scaled as torchvision's ``Resize(resize, BICUBIC)`` does. Other formats become
    PNG.

    Raises:
        UndecodableImageError: as `decode`.
    """
    image, format_name = decode(content)
    suffix = STOCK_FORMATS.get(format_name)
    if resize is not None and min(image.size) > resize:
        image = image.resize(resized(image.size, resize), Image.Resampling.BICUBIC)
        if suffix in ("jpg", "webp"):
            return "jpg", _encode(image, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return "png", _encode(image, "PNG")
    if suffix is None:
        return "png", _encode(image, "PNG")
    return suffix, content


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
