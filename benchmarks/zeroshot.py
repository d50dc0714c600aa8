"""Zero-shot evaluation: metrics at the size of Google Open Images, and the encoding of class names.

``python -m benchmarks.zeroshot`` measures

* ``multilabel_metrics`` (F@K and mAP together) on random features of 125,436 images and 19,994
  classes, in a process of its own;
* the same and clip_benchmark's own code (dense logits, then each class's average precision; mAP
  only, it has no F@K) in turn, at sizes that clip_benchmark can hold;
* class names encoded in batches and as clip_benchmark does, one at a time, on a text tower with
  random weights.

A part that is left out keeps its figures of the run before.
"""

from __future__ import annotations

import argparse
import functools
import json
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
WIDTH = 768
BATCH = 64  # images, clip_benchmark's default
LABELS_PER_IMAGE = 4.0
# Bars of the whole evaluation at GOI's size and of the encoding.
MOST_SECONDS, MOST_BYTES, LEAST_SPEEDUP = 600.0, 3e9, 5.0
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
    given = unit(images, 0), unit(classes, 1), labels(images, classes)
    return lambda: multilabel_metrics(*given)


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
        with replaced((stock, "tqdm", lambda loader: loader)):
            found = stock.run_classification(model, weights, batches(), "cpu", amp=False)
        return {"mean_average_precision": stock.average_precision_per_class(*found).mean().item()}

    return call


def _keep(found: dict[str, Any], name: str, call: Callable[[], Any]) -> None:
    found[name] = call()


def compare(sizes: list[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """A row per size and contestant; clip_benchmark's mean average precision must come out."""
    rows = []
    for images, classes in sizes:
        made = {"ours": ours, "clip_benchmark": theirs}
        calls = {name: make(images, classes) for name, make in made.items()}
        found: dict[str, dict[str, float]] = {}
        timed = {name: functools.partial(_keep, found, name, call) for name, call in calls.items()}
        seconds = common.paired(timed, rounds, label=f"{images} x {classes}")
        del calls, timed
        difference = abs(
            found["ours"]["mean_average_precision"]
            - found["clip_benchmark"]["mean_average_precision"]
        )
        memory = {
            name: common.peak_memory(make, images, classes)["added"] for name, make in made.items()
        }
        for name in made:
            rows.append(
                {
                    "images": images,
                    "classes": classes,
                    "code": name,
                    "rounds": rounds,
                    "seconds": statistics.median(seconds[name]),
                    "of clip_benchmark": common.ratio(seconds[name], seconds["clip_benchmark"]),
                    "MB added": memory[name] / 1e6,
                    "MB of clip_benchmark": memory[name] / memory["clip_benchmark"],
                    "mAP difference": difference,
                }
            )
        print(common.table(rows[-2:]), flush=True)
    return rows


def whole(images: int, classes: int) -> dict[str, Any]:
    """F@K and mAP once at full size, against the one matrix product of scores that it cannot avoid."""
    memory = common.peak_memory(ours, images, classes)
    tile = min(1024, images)
    product = common.product_rate(tile, classes, WIDTH) * images / tile
    positives = sum(map(len, labels(images, classes)))
    return {
        "images": images,
        "classes": classes,
        "labels": positives,
        "seconds": memory["seconds"],
        "of one product": memory["seconds"] / product,
        "process MB": memory["process"] / 1e6,
        "added MB": memory["added"] / 1e6,
        "one score matrix MB": images * classes * 4 / 1e6,
        "within bars": memory["seconds"] < MOST_SECONDS and memory["process"] < MOST_BYTES,
    }


def encoding(name: str, count: int, rounds: int) -> list[dict[str, Any]]:
    """Names of ImageNet's classes, one template, float32: in batches against one at a time."""
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    tokenizer = open_clip.get_tokenizer(name)
    every = open_clip.IMAGENET_CLASSNAMES
    names = list(dict.fromkeys(every[:: max(1, len(every) // count)]))[:count]
    prompts = [(TEMPLATE.format(c=name),) for name in names]

    def batched() -> Tensor:
        return classifier.class_features(model, tokenizer, prompts, device="cpu")

    def padded() -> Tensor:  # without the shorter sequences, to tell the two gains apart
        with replaced((classifier, "_encoder", lambda model, *_: model.encode_text)):
            return batched()

    def single() -> Tensor:
        with replaced((stock, "tqdm", lambda names: names)):
            return stock.zero_shot_classifier(
                model, tokenizer, names, [TEMPLATE], "cpu", amp=False
            ).T

    calls = {"ours": batched, "ours, all padding": padded, "clip_benchmark": single}
    seconds = common.paired(calls, rounds, label=f"{len(names)} names, {name}")
    base = single()
    rows = [
        {
            "model": name,
            "names": len(names),
            "code": code,
            "rounds": rounds,
            "seconds": statistics.median(seconds[code]),
            "times faster": common.ratio(seconds["clip_benchmark"], seconds[code]),
            "largest difference": float((call() - base).abs().max()),
        }
        for code, call in calls.items()
    ]
    print(common.table(rows), flush=True)
    return rows


def draw(results: dict[str, Any], path: Any) -> None:
    """Memory and time over the number of scores, with the bars; and names a second."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    rows, full = results.get("compare", []), results.get("goi")
    for axis, key, label in (
        (axes[0], "MB added", "peak MB added"),
        (axes[1], "seconds", "seconds"),
    ):
        for code in ("ours", "clip_benchmark"):
            mine = [(r["images"] * r["classes"], r[key]) for r in rows if r["code"] == code]
            if full and code == "ours":
                value = full["added MB"] if key == "MB added" else full["seconds"]
                mine.append((full["images"] * full["classes"], value))
            if mine:
                axis.plot(*zip(*mine, strict=True), "o-", label=code)
        axis.set(xscale="log", yscale="log", xlabel="images x classes", ylabel=label)
        axis.grid(alpha=0.3)
    for axis, bar in ((axes[0], MOST_BYTES / 1e6), (axes[1], MOST_SECONDS)):
        axis.axhline(bar, color="grey", linestyle="--", label="bar at GOI's size (whole process)")
        axis.legend()
    encoded = results.get("encoding", [])
    rates = [row["names"] / row["seconds"] for row in encoded]
    drawn = axes[2].bar([row["code"] for row in encoded], rates, color=["C0", "C2", "C1"])
    axes[2].bar_label(drawn, [f"{row['times faster']:.1f}x" for row in encoded])
    axes[2].set(ylabel="class names a second")
    axes[2].margins(y=0.12)
    figure.suptitle("Zero-shot evaluation, float32, CPU")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _size(text: str) -> tuple[int, int]:
    images, _, classes = text.partition("x")
    return int(images), int(classes)


def main() -> None:
    """Run everything asked for; prints tables, writes JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes",
        type=_size,
        nargs="*",
        default=[(4000, 2000), (16000, 8000)],
        metavar="IMAGESxCLASSES",
        help="of the comparison; clip_benchmark needs 10 bytes a score",
    )
    parser.add_argument("--goi", type=_size, default=GOI, help="0x0: leave out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="ViT-B-32", help="whose text tower encodes the names")
    parser.add_argument("--names", type=int, default=100, help="0: leave out")
    parser.add_argument("--name", default="zeroshot", help="of the files in benchmarks/results")
    args = parser.parse_args()
    path = common.RESULTS / f"{args.name}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    results |= {"D": WIDTH, "dtype": "float32"}

    def keep(part: str, found: Any) -> None:
        results[part] = found
        results.setdefault("machine", {})[part] = common.machine()
        common.save(args.name, results)

    if args.goi[0]:
        keep("goi", whole(*args.goi))
        print(common.table([results["goi"]]), flush=True)
    if args.names:
        keep("encoding", encoding(args.model, args.names, args.rounds))
    if args.sizes:
        keep("compare", compare(args.sizes, args.rounds))
    draw(results, path.with_suffix(".png"))
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
