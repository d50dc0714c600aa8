"""Zero-shot evaluation: metrics at the size of Google Open Images, and the encoding of class names.

``python -m benchmarks.zeroshot`` measures

* ``goi``: ``multilabel_metrics`` on random features of 125,436 images and 19,994 classes, in a
  process of its own;
* ``compare``: the same and clip_benchmark's own code (mAP only, it has no F@K) in turn, at a size
  that clip_benchmark can hold;
* ``encoding``: class names encoded in batches and as clip_benchmark does, one at a time, on a text
  tower with random weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_classification as stock
from torch import Tensor

from benchmarks import common
from otter_openclip.evaluation import classifier, multilabel_metrics
from otter_openclip.replacing import replaced

GOI = (125_436, 19_994)
COMPARED = (16_000, 8_000)
WIDTH = 768
BATCH = 64  # images, clip_benchmark's default
LABELS_PER_IMAGE = 4.0
NAMES, ROUNDS = 100, 3
TEMPLATE = "a photo of {c}."


def unit(rows: int, seed: int) -> Tensor:
    """(rows, WIDTH) random unit vectors, float32."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, WIDTH, generator=generator)
    return F.normalize(features, dim=1, out=features)


def labels(images: int, classes: int) -> list[np.ndarray]:
    """Each image's classes: one and a Poisson number of more, of frequencies that fall as 1 / rank."""
    generator = np.random.default_rng(images)
    frequency = 1 / (10.0 + generator.permutation(classes))
    counts = 1 + generator.poisson(LABELS_PER_IMAGE - 1, images)
    drawn = generator.choice(classes, counts.sum(), p=frequency / frequency.sum())
    return [np.unique(part) for part in np.split(drawn, counts.cumsum()[:-1])]


def ours(images: int, classes: int) -> Callable[[], dict[str, float]]:
    """F@K and mAP by ``multilabel_metrics``."""
    features, weights, true = unit(images, 0), unit(classes, 1), labels(images, classes)
    return lambda: multilabel_metrics(features, weights, true)


def theirs(images: int, classes: int) -> Callable[[], dict[str, float]]:
    """MAP by clip_benchmark's functions, from image features that its "model" hands through."""
    features, weights = unit(images, 0), unit(classes, 1).T.contiguous()
    true = labels(images, classes)
    model = SimpleNamespace(encode_image=lambda batch: batch)

    def batches() -> Any:
        for begin in range(0, images, BATCH):
            batch = features[begin : begin + BATCH]
            target = torch.zeros(len(batch), classes, dtype=torch.uint8)
            for row, label in zip(target, true[begin : begin + BATCH], strict=True):
                row[label] = 1
            yield batch, target

    def call() -> dict[str, float]:
        with replaced((stock, "tqdm", iter)):
            scored = stock.run_classification(model, weights, batches(), "cpu", amp=False)
        return {"mean_average_precision": stock.average_precision_per_class(*scored).mean().item()}

    return call


def goi() -> list[dict[str, Any]]:
    """F@K and mAP once at full size, against the one matrix product of scores that it cannot avoid."""
    images, classes = GOI
    memory = common.peak_memory(ours, images, classes)
    product = common.product_rate(1024, classes, WIDTH) * images / 1024
    return [
        {
            "images": images,
            "classes": classes,
            "seconds": memory["seconds"],
            "of one product": memory["seconds"] / product,
            "process MB": memory["process"] / 1e6,
            "added MB": memory["added"] / 1e6,
            "one score matrix MB": images * classes * 4 / 1e6,
        }
    ]


def compare() -> list[dict[str, Any]]:
    """A row for each contestant; clip_benchmark's mean average precision must come out."""
    made = {"ours": ours, "clip_benchmark": theirs}
    calls = {name: make(*COMPARED) for name, make in made.items()}
    precisions = [call()["mean_average_precision"] for call in calls.values()]
    seconds = common.paired(calls, ROUNDS, label="metrics")
    del calls
    return [
        {
            "images": COMPARED[0],
            "classes": COMPARED[1],
            "code": name,
            "seconds": statistics.median(seconds[name]),
            "of clip_benchmark": common.ratio(seconds[name], seconds["clip_benchmark"]),
            "MB added": common.peak_memory(make, *COMPARED)["added"] / 1e6,
            "mAP difference": abs(precisions[0] - precisions[1]),
        }
        for name, make in made.items()
    ]


def encoding() -> list[dict[str, Any]]:
    """Names of ImageNet's classes, one template, float32: in batches against one at a time."""
    torch.manual_seed(0)
    model, tokenizer = (
        open_clip.create_model("ViT-B-32").eval(),
        open_clip.get_tokenizer("ViT-B-32"),
    )
    names = list(dict.fromkeys(open_clip.IMAGENET_CLASSNAMES))[:NAMES]
    prompts = [(TEMPLATE.format(c=name),) for name in names]

    def batched() -> Tensor:
        return classifier.class_features(model, tokenizer, prompts, device="cpu")

    def single() -> Tensor:
        with replaced((stock, "tqdm", iter)):
            return stock.zero_shot_classifier(
                model, tokenizer, names, [TEMPLATE], "cpu", amp=False
            ).T

    calls = {"ours": batched, "clip_benchmark": single}
    seconds = common.paired(calls, ROUNDS, label="names")
    difference = float((batched() - single()).abs().max())
    return [
        {
            "names": len(names),
            "code": code,
            "seconds": statistics.median(seconds[code]),
            "times faster": common.ratio(seconds["clip_benchmark"], seconds[code]),
            "largest difference": difference,
        }
        for code in calls
    ]


def main() -> None:
    """Run all parts; prints tables and writes JSON."""
    results: dict[str, Any] = {"machine": common.machine()}
    for part in (goi, compare, encoding):
        results[part.__name__] = part()
        print(common.table(results[part.__name__]), flush=True)
    common.save("zeroshot", results)


if __name__ == "__main__":
    main()
