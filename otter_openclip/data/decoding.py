"""The conversion of images that stock loaders cannot read, or misread.

open_clip's loaders give ``Image.convert("RGB")``: EXIF orientation is passed over, and pixels of more
than 8 bits a channel are cut at 255. So nothing is turned here either, and such pixels are scaled.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from otter_openclip.shards import read as shard_samples
from otter_openclip.shards.read import SampleError

# PIL's name of a format -> suffix. clip_benchmark reads webp, png, jpg and jpeg; open_clip the same.
# MPO is a JPEG with further pictures behind it.
STOCK_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_SUFFIXES = Image.registered_extensions().items()
IMAGE_SUFFIXES = {"", *(suffix for suffix, name in _SUFFIXES if name in Image.OPEN)}
JPEG_QUALITY = 95
_BITS, _PHOTOMETRIC = 258, 262  # of a TIFF
_SIXTEEN_BITS = ("PNG", "PPM", "TIFF", "JPEG2000")  # whose integers have their bits for a range


def prepare(content: bytes, resize: int | None = None) -> tuple[str, bytes]:
    """The suffix and content to store for an image file's ``content``.

    JPEG, PNG and WebP stay byte for byte what they are, unless their shorter side exceeds ``resize``
    pixels; then they are scaled as torchvision's ``Resize(resize, BICUBIC)`` does. Other formats, and
    pixels of more than 8 bits, become PNG. SampleError if Pillow cannot read all of it; as `eight_bits`.
    """
    image = shard_samples.opened(content, whole=True)
    suffix = STOCK_FORMATS.get(image.format or "")
    if image.mode[0] in "IF":
        with shard_samples.readable():  # tags may be damaged
            image, suffix = eight_bits(image), None
    large = resize is not None and min(image.size) > resize
    if suffix is not None and not large:
        return suffix, content
    image = shard_samples.rgb(image)
    if large:
        width, height = image.size  # the longer side is rounded down, as torchvision does
        size = (resize, int(resize * height / width)), (int(resize * width / height), resize)
        image = image.resize(size[width > height], Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if suffix in ("jpg", "webp"):
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return "jpg", buffer.getvalue()
    image.save(buffer, "PNG")
    return "png", buffer.getvalue()


def eight_bits(image: Image.Image) -> Image.Image:
    """A picture of up to 16 bits a pixel with 8; SampleError if nothing says what range others have."""
    integers = image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF")
    if not integers or image.format not in _SIXTEEN_BITS:
        raise SampleError(f"{image.mode} pixels of no stated range; scale them to 8 bits")
    tags = getattr(image, "tag_v2", {})
    high = 2.0 ** tags.get(_BITS, (16,))[0] - 1
    pixels = np.asarray(image, np.float64) * (255 / high)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds up to 8 bits only
        pixels = 255 - pixels
    return Image.fromarray(np.round(pixels).astype(np.uint8))
