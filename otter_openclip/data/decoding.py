"""The conversion of images that stock loaders do not look for, and their scaling.

open_clip's loaders give ``Image.convert("RGB")``: EXIF orientation is passed over, so nothing is turned
here either; what such a loader would cut off is refused.
"""

from __future__ import annotations

import io

from PIL import Image

from otter_openclip.shards import read as shard_samples

# PIL's name of a format -> suffix. clip_benchmark reads webp, png, jpg and jpeg; open_clip the same.
# MPO is a JPEG with further pictures behind it.
STOCK_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_SUFFIXES = Image.registered_extensions().items()
IMAGE_SUFFIXES = {"", *(suffix for suffix, name in _SUFFIXES if name in Image.OPEN)}
JPEG_QUALITY = 95


def prepare(content: bytes, resize: int | None = None) -> tuple[str, bytes]:
    """The suffix and content to store for an image file's ``content``.

    JPEG, PNG and WebP stay byte for byte what they are, unless their shorter side exceeds ``resize``
    pixels; then they are scaled as torchvision's ``Resize(resize, BICUBIC)`` does. Other formats become
    PNG. SampleError if Pillow cannot read all of it, or pixels have more than 8 bits.
    """
    image = shard_samples.opened(content, whole=True)
    shard_samples.check_range(image)
    suffix = STOCK_FORMATS.get(image.format or "")
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
