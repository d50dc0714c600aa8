"""One run of ``benchmarks.data_efficiency``: its pairs, the real training command, what it measured.

The command runs in this process. Shards, what frozen towers give for them (``--feature-cache``), logs
and the one checkpoint lie in a scratch folder; runs on the same pairs share shards and features.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
import webdataset
from safetensors.torch import save_file

from otter_openclip import train
from otter_openclip.compare.dataset import npy, write_tar
from otter_openclip.files import write_json

SHARDS = 4
IMAGES = ("jpg", "png", "jpeg", "webp")
HALVES = ("validation", "test")  # of the evaluation images: to choose settings by, and to report


class Run(NamedTuple):
    """All that tells one training run from another."""

    data: str
    pairs: int
    noise: float  # share of captions that are shuffled
    seed: int
    loss: str
    lr: float
    steps: int
    scale: float  # log of both scales at the start
    decay: float  # of weights; open_clip spares the scales
    batch: int
    flags: tuple[str, ...] = ()
    train_image: int | None = None  # image size if the image tower is trained as well
    half: str = "test"  # of the evaluation images


def draw(size: int, pairs: int, noise: float, seed: int) -> list[tuple[int, int]]:
    """Image and caption of each of ``pairs`` of ``size`` pairs; of a share ``noise`` not its own.

    Fewer pairs and less noise are subsets of more, with one seed.
    """
    rng = random.Random(seed)
    images = rng.sample(range(size), size)[:pairs]
    places = rng.sample(range(pairs), pairs)[: round(noise * pairs)]
    captions = list(images)
    for place, other in zip(places, [*places[1:], *places[:1]], strict=True):
        captions[place] = images[other]
    return list(zip(images, captions, strict=True))


def _samples(shards: Sequence[Path]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Kind of each sample's image, and its contents; samples without an image are left out."""
    for shard in shards:
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
            if kind := next((kind for kind in IMAGES if kind in sample), None):
                yield kind, sample


class Source:
    """Training pairs and an evaluation set, of which halves are written into ``folder``."""

    def __init__(self, name: str, pairs: str | Path, labelled: str | Path, folder: Path) -> None:
        """Read the pairs and split the evaluation set; both are folders of webdataset shards."""
        self.name, self.labelled = name, Path(labelled)
        self.pairs = [
            (kind, sample[kind], sample["txt"])
            for kind, sample in _samples(sorted(Path(pairs).glob("*.tar")))
            if "txt" in sample
        ]
        if not self.pairs:
            raise ValueError(f"--data {name}: no images with a .txt in the *.tar of {pairs}")
        self.halves = {half: folder / name / half for half in HALVES}
        # A class without an image counts 0 in mean_average_precision, which is over all classes.
        self.shares = dict(zip(HALVES, self._split(), strict=True))

    def _split(self) -> Iterator[float]:
        """Write the halves; gives for each the share of the classes that have images there."""
        classes = len((self.labelled / "classnames.txt").read_text(encoding="utf-8").splitlines())
        count = int((self.labelled / "test" / "nshards.txt").read_text(encoding="utf-8"))
        shards = [self.labelled / "test" / f"{number}.tar" for number in range(count)]
        samples, vectors = [], []
        for kind, sample in _samples(shards):
            if "npy" in sample:
                vectors.append(np.load(io.BytesIO(sample["npy"])).astype(np.uint8))
            else:
                vectors.append(np.eye(classes, dtype=np.uint8)[int(sample["cls"])])
            samples.append({kind: sample[kind], "npy": npy(vectors[-1])})
        order = np.random.default_rng(0).permutation(len(samples))
        for half, part in zip(HALVES, np.array_split(order, 2), strict=True):
            folder = self.halves[half]
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "test").mkdir(parents=True)
            write_tar(folder / "test" / "0.tar", [samples[n] for n in sorted(part)])
            (folder / "test" / "nshards.txt").write_text("1", encoding="utf-8")
            for path in self.labelled.glob("*.txt"):
                shutil.copy(path, folder)
            (folder / "dataset_type.txt").write_text("multilabel", encoding="utf-8")
            yield float(np.stack([vectors[n] for n in part]).any(axis=0).mean())

    def write(self, folder: Path, drawn: Sequence[tuple[int, int]]) -> None:
        """Write shards of the pairs that ``draw`` gave."""
        folder.mkdir(parents=True)
        for shard in range(SHARDS):
            samples = (
                {self.pairs[image][0]: self.pairs[image][1], "txt": self.pairs[caption][2]}
                for image, caption in drawn[shard::SHARDS]
            )
            write_tar(folder / f"{shard:05d}.tar", samples)


def write_model(towers: Path, out: Path, state: dict[str, Any], **changes: Any) -> Path:
    """The folder ``towers`` with other weights, and ``changes`` of its model's configuration."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    state = {name: value.contiguous() for name, value in state.items()}
    save_file(state, out / "open_clip_model.safetensors", metadata={"format": "pt"})
    for path in towers.glob("*.json"):
        shutil.copy(path, out)
    config = json.loads((out / "open_clip_config.json").read_text(encoding="utf-8"))
    config["model_cfg"] |= changes
    write_json(out / "open_clip_config.json", config)
    return out


def write_start(towers: Path, out: Path, *, scale: float, seed: int) -> Path:
    """The folder ``towers`` with another ``logit_scale``, and heads drawn by ``seed``.

    A head that is the identity stays it.
    """
    model = open_clip.create_model(f"local-dir:{towers}")
    torch.nn.init.constant_(model.logit_scale, scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for head in (model.visual.head, model.text.proj):
            for module in head.modules():
                weight = getattr(module, "weight", None)
                square = weight is not None and weight.ndim == 2 and len(set(weight.shape)) == 1
                identity = square and torch.equal(weight, torch.eye(len(weight)))
                if hasattr(module, "reset_parameters") and not identity:
                    module.reset_parameters()
    return write_model(towers, out, model.state_dict(), init_logit_scale=scale)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep what a command prints and logs; RuntimeError with the end of it if it fails."""
    root, text = logging.getLogger(), io.StringIO()
    level, handlers = root.level, list(root.handlers)
    root.handlers.clear()
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            yield
    except (Exception, SystemExit) as error:
        tail = "\n".join(text.getvalue().splitlines()[-15:])
        raise RuntimeError(f"training failed: {error}\n{tail}") from error
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)


class Workplace:
    """Where runs are done, one at a time."""

    def __init__(self, sources: Sequence[Source], towers: Path, scratch: Path) -> None:
        """The folder ``scratch`` is in use while runs are done."""
        self.sources = {source.name: source for source in sources}
        self.towers, self.scratch = towers.resolve(), scratch
        parts = sorted([*towers.glob("*.json"), *towers.glob("*.safetensors")])
        contents = [path.read_bytes() for path in parts]
        self.digest = hashlib.sha256(b"".join(contents)).hexdigest()[:12]
        self._group: tuple[Any, ...] | None = None

    def key(self, run: Run) -> str:
        """Of a result: all settings and the towers."""
        return json.dumps({**run._asdict(), "towers": self.digest}, sort_keys=True)

    def folders(self, run: Run) -> tuple[Path, Path]:
        """The run's shards and the model it starts from; runs of equal pairs share them."""
        group = run.data, run.pairs, run.noise, run.seed
        folder = self.scratch / "group"
        if group != self._group:
            shutil.rmtree(folder, ignore_errors=True)
            source = self.sources[run.data]
            drawn = draw(len(source.pairs), run.pairs, run.noise, run.seed)
            source.write(folder / "pairs", drawn)
            self._group = group
        start = folder / f"start-{run.scale}"
        if not start.is_dir():
            write_start(self.towers, start, scale=run.scale, seed=run.seed)
        return folder / "pairs", start

    def train(self, run: Run, start: Path | None = None) -> Path:
        """The folder of a run's logs; it begins at the folder ``start`` or at drawn heads.

        One epoch of steps x batch samples passes over the pairs.
        """
        pairs, drawn = self.folders(run)
        image = ["--lock-image"]
        if run.train_image is not None:
            image = ["--force-image-size", str(run.train_image)]
        words = [
            *("--loss", run.loss, "--model", f"local-dir:{start or drawn}"),
            *("--train-data", str(pairs / f"{{00000..{SHARDS - 1:05d}}}.tar"), "--epochs", "1"),
            *("--train-num-samples", str(run.steps * run.batch), "--batch-size", str(run.batch)),
            *("--lr", str(run.lr), "--wd", str(run.decay), "--warmup", str(run.steps // 10)),
            # open_clip's defaults depend on what the model's path looks like.
            *("--beta1", "0.9", "--beta2", "0.999", "--eps", "1e-8"),
            *("--workers", "0", "--seed", str(run.seed), "--save-frequency", "0"),
            *("--log-every-n-steps", "1000000", "--lock-text", "--lock-text-freeze-layer-norm"),
            *("--feature-cache", str(self.scratch / "group" / "features"), *image),
            *("--zeroshot-data", str(self.sources[run.data].halves[run.half])),
        ]
        if run.loss in ("kd", "otter"):
            words += ["--init-distill-logit-scale", str(run.scale)]
        return self.command([*words, *run.flags])

    def command(self, words: Sequence[str]) -> Path:
        """Run the training command; returns the folder of its logs, which the next run replaces."""
        logs = self.scratch / "logs"
        shutil.rmtree(logs, ignore_errors=True)
        with quietly():
            if train.main([*words, "--logs", str(logs), "--name", "run"]) != 0:
                raise RuntimeError("the command returned an error")
        return logs / "run"

    def measured(self, logs: Path, data: str, half: str) -> dict[str, float]:
        """What a run measured of its last epoch, shares; ``mAP`` is over classes that have images."""
        lines = (logs / "checkpoints" / "results.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = {
            name.removeprefix("zeroshot-"): value
            for name, value in json.loads(lines[-1]).items()
            if name.startswith("zeroshot-")
        }
        return {
            **metrics,
            "mAP": metrics["mean_average_precision"] / self.sources[data].shares[half],
        }

    def do(self, run: Run) -> dict[str, float]:
        """Train and measure."""
        return self.measured(self.train(run), run.data, run.half)
