"""Training with locked towers, live and on ``--feature-cache``: samples per second, memory, disk.

Every figure is of the real command, run as a process of its own on made-up pictures, live and cached
in turn. Without ``--towers`` they have the shapes of EfficientNet-Lite0 and all-MiniLM-L6-v2 and random
weights, which cost what pretrained ones cost. Large sets are made: their features are repeated, and
their shards, which a second start does not open, hold nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from tqdm import tqdm
from transformers import BertConfig, BertModel, BertTokenizerFast

from benchmarks import common
from otter_openclip.frozen.store import FeatureFiles
from otter_openclip.model_folders.towers import make_towers
from otter_openclip.shards.write import write_shard

LOCKS = {
    "image": ["--lock-image"],
    "both": ["--lock-image", "--lock-text", "--lock-text-freeze-layer-norm"],
}
WORDS = [f"word{i}" for i in range(2000)]
SHARDS = 8


def make_text_tower(folder: Path) -> Path:
    """A Hugging Face folder with the shapes of all-MiniLM-L6-v2."""
    folder.mkdir()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*special, *WORDS]), encoding="utf-8")
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def make_model(folder: Path, size: int) -> Path:
    """Both towers, in a folder for ``--model local-dir:``."""
    name, weights = "tf_efficientnet_lite0", folder / "image.pt"
    torch.save(timm.create_model(name).state_dict(), weights)
    return make_towers(
        folder / "towers",
        image=name,
        image_weights=weights,
        text=make_text_tower(folder / "text"),
        image_size=size,
        context_length=32,
    )


def write_shards(folder: Path, count: int, size: int) -> str:
    """``count`` JPEG pictures with captions of ten words; returns ``--train-data``."""
    folder.mkdir()
    rng, noise = random.Random(0), np.random.default_rng(0)
    sizes = {}
    for shard in tqdm(range(SHARDS), "Drawing pictures", leave=False):
        samples = []
        for i in range(count // SHARDS):
            coarse = Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8))
            coarse.resize((size, size)).save(picture := io.BytesIO(), "JPEG")
            caption = " ".join(rng.choices(WORDS, k=10)).encode()
            samples.append((f"{shard}{i:06d}", {"jpg": picture.getvalue(), "txt": caption}))
        path = folder / f"{shard:05d}.tar"
        sizes[path.name] = write_shard(path, samples)
    (folder / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
    return str(folder / f"{{00000..{SHARDS - 1:05d}}}.tar")


def train(
    logs: Path, model: Path, data: str, loss: str, lock: str, batch: int, steps: int, *extra: str
) -> dict[str, Any]:
    """One run of the command: median seconds of its steps but the first, peak memory, wall time."""
    name = f"{time.monotonic_ns()}"
    command = [
        *(sys.executable, "-m", "otter_openclip.train", "--loss", loss),
        *("--model", f"local-dir:{model}", "--train-data", data, *LOCKS[lock]),
        *("--batch-size", str(batch), "--train-num-samples", str(batch * steps)),
        *("--epochs", "1", "--warmup", "0", "--workers", "1", "--log-every-n-steps", "1"),
        *("--precision", "fp32", "--save-frequency", "0", "--logs", str(logs), "--name", name),
        *extra,
    ]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    began = started = time.monotonic()
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    text = ""
    with subprocess.Popen(command, env=environment, **output) as process:
        for line in process.stdout:
            text += line
            started = time.monotonic() if "Start epoch" in line else started
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{text[-3000:]}")
    seconds = [float(found) for found in re.findall(r"Batch \(t\): ([\d.]+)", text)]
    return {
        "step": statistics.median(seconds[1:]),
        "peak": usage.ru_maxrss * 1024,
        "wall": time.monotonic() - began,
        "start": started - began,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--towers", type=Path, help="folder of otter-openclip towers; made up if left out"
    )
    parser.add_argument("--image-size", type=int, default=112, help="of made-up towers")
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--locks", choices=LOCKS, nargs="+", default=[*LOCKS])
    parser.add_argument("--rounds", type=int, default=3, help="of OTTER against CLIP")
    parser.add_argument("--made", type=int, nargs="+", default=[6_000, 60_000, 600_000])
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/features.json"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args)
    print(common.table(found["runs"]))
    print(common.table(found["step"]))
    print(common.table(found["made"]))
    if args.save:
        print(common.save("features", found))


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    model = args.towers.resolve() if args.towers else make_model(folder, args.image_size)
    count = max(args.batches)
    data = write_shards(folder / "data", count, args.image_size)
    rows = []
    for lock in args.locks:
        cache = folder / f"cache-{lock}"
        caching = ("--feature-cache", str(cache))
        for batch in args.batches:
            arguments = (folder / "logs", model, data, "otter", lock, batch)
            first = train(*arguments, 6, *caching)
            cached = train(*arguments, 6, *caching)
            live = train(*arguments, 3)
            disk = sum(file.stat().st_size for file in cache.rglob("*.npy"))
            rows.append(
                {
                    "locked": lock,
                    "batch": batch,
                    "live/s": batch / live["step"],
                    "cached/s": batch / cached["step"],
                    "ratio": live["step"] / cached["step"],
                    "live MiB": live["peak"] / 2**20,
                    "cached MiB": cached["peak"] / 2**20,
                    "disk B/sample": disk / count,
                    "build s": first["wall"] - cached["wall"] if batch == args.batches[0] else None,
                }
            )
            print(common.table(rows[-1:]), flush=True)
    return {
        "machine": common.machine(),
        "samples": count,
        "runs": rows,
        "step": steps(folder, model, data, args),
        "made": [second_start(folder, model, data, args, pairs) for pairs in args.made],
    }


def second_start(
    folder: Path, model: Path, data: str, args: argparse.Namespace, pairs: int
) -> dict[str, Any]:
    """A start with all features of so many made pairs, and its steps; both towers locked."""
    cache, batch, per_shard = folder / "cache-both", args.batches[0], 2_000
    arguments = (folder / "logs", model)
    if not cache.exists():
        train(*arguments, data, "otter", "both", batch, 3, "--feature-cache", str(cache))
    shards = folder / f"made-{pairs}"
    shards.mkdir()
    rows = {path.parent: np.load(path) for path in cache.rglob("00000-*.npy")}
    for number in tqdm(range(pairs // per_shard), f"Making {pairs} pairs", leave=False):
        shard = shards / f"{number:05d}.tar"
        shard.write_bytes(bytes(number + 1))  # of a size of its own
        for column, features in rows.items():
            repeated = np.resize(features, (per_shard, *features.shape[1:]))
            FeatureFiles(column).write(str(shard), repeated)
    made = str(shards / f"{{00000..{pairs // per_shard - 1:05d}}}.tar")
    steps = max(4, min(pairs // batch, 100))
    run = train(*arguments, made, "otter", "both", batch, steps, "--feature-cache", str(cache))
    peak = run["peak"] / 2**20
    return {
        "pairs": pairs,
        "start s": run["start"],
        "samples/s": batch / run["step"],
        "peak MiB": peak,
    }


def steps(folder: Path, model: Path, data: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """OTTER's live step over InfoNCE's and over stock open_clip's, both towers locked."""
    losses = ("clip", "infonce", "otter")
    batch = args.batches[0]
    seconds: dict[str, list[float]] = {loss: [] for loss in losses}
    for _ in tqdm(range(args.rounds), "OTTER against CLIP", leave=False):
        for loss in losses:
            run = train(folder / "logs", model, data, loss, "both", batch, 3)
            seconds[loss].append(run["step"])
    return [
        {"OTTER over": loss, "batch": batch, "ratio": common.ratio(seconds["otter"], seconds[loss])}
        for loss in losses[:2]
    ]


if __name__ == "__main__":
    main()
