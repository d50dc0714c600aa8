"""One run of ``benchmarks.data_efficiency``: its pairs, the real training command, what its heads give.

The command runs in this process. What costs without being measured is kept small: frozen towers encode
an image once for all runs (``--feature-cache``; for evaluation a file beside the results), and shards,
logs and the one checkpoint lie in a scratch folder, in memory where the system has one.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import hashlib
import io
import json
import logging
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import webdataset
from clip_benchmark.datasets.builder import build_wds_dataset
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import otter_openclip
from otter_openclip import train
from otter_openclip.compare.dataset import write_tar
from otter_openclip.evaluation import multilabel_metrics
from otter_openclip.evaluation.labelled_images import (
    LabelledImages,
    encode_images,
    is_multilabel,
)
from otter_openclip.evaluation.prompts import class_prompts
from otter_openclip.evaluation.validator import check_webdataset
from otter_openclip.files import write_json, written_whole
from otter_openclip.frozen.prefix import find_prefixes, install
from otter_openclip.frozen.prefix import run as run_prefix

SHARDS = 4
IMAGES = ("jpg", "png", "jpeg", "webp")
# What a result depends on; a change of the rest of the package does not make it stale.
CODE = (
    "losses.py",
    "sinkhorn.py",
    "teacher.py",
    "fast/*.py",
    "training/frozen.py",
    "training/objectives.py",
    "training/repeatable.py",
    "training/wrapper.py",
    "evaluation/metrics.py",
)


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


def halves(count: int) -> dict[str, np.ndarray]:
    """The evaluation images that settings are chosen by, and those that are reported."""
    order = np.random.default_rng(0).permutation(count)
    return {"val": np.sort(order[: count // 2]), "test": np.sort(order[count // 2 :])}


def code_digest() -> str:
    """Of the code that results depend on, without its comments and docstrings."""
    package = Path(otter_openclip.__file__).parent
    files = [path for pattern in CODE for path in sorted(package.glob(pattern))]
    found = hashlib.sha256(f"{torch.__version__} {open_clip.__version__}".encode())
    for path in [*files, Path(__file__)]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [line for line in body if not _is_docstring(line)]
        found.update(f"{path.name} {ast.dump(tree)}".encode())
    return found.hexdigest()[:12]


def _is_docstring(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


class Source:
    """Training pairs and a multi-label evaluation set."""

    def __init__(self, name: str, pairs: str | Path, labelled: str | Path) -> None:
        """Folders of webdataset shards; ValueError saying what is missing there."""
        self.name, self.pairs, self.labelled = name, Path(pairs), Path(labelled)
        self.shards = sorted(self.pairs.glob("*.tar"))
        if not self.shards:
            raise ValueError(
                f"--data {name}: no *.tar in {pairs}; give a folder of training shards"
            )
        check_webdataset(str(labelled), flag=f"--data {name}:")

    @functools.cached_property
    def samples(self) -> list[tuple[str, bytes, bytes]]:
        """Kind and content of each image, and its caption."""
        found = []
        for shard in self.shards:
            for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
                kind = next((kind for kind in IMAGES if kind in sample), None)
                if kind is not None and "txt" in sample:
                    found.append((kind, sample[kind], sample["txt"]))
        if not found:
            raise ValueError(f"--data {self.name}: no images with a .txt in {self.pairs}")
        return found

    @functools.cached_property
    def digest(self) -> str:
        """Of all that is read from the two folders."""
        return files_digest([*self.shards, *sorted(self.labelled.rglob("*"))])

    def write(self, folder: Path, drawn: Sequence[tuple[int, int]]) -> None:
        """Shards of the pairs that ``draw`` gave."""
        folder.mkdir(parents=True)
        for shard in range(SHARDS):
            samples = (
                {self.samples[image][0]: self.samples[image][1], "txt": self.samples[caption][2]}
                for image, caption in drawn[shard::SHARDS]
            )
            write_tar(folder / f"{shard:05d}.tar", samples)


def files_digest(paths: Sequence[Path], without: str = "") -> str:
    """Of names and contents of files; of small ones' the text ``without`` is passed over."""
    found = hashlib.sha256()
    for path in paths:
        if path.is_file():
            content = path.read_bytes()
            if without and len(content) < 1e6:
                content = content.replace(without.encode(), b"")
            found.update(f"{path.name} {len(content)} ".encode() + content)
    return found.hexdigest()[:12]


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
                if hasattr(module, "reset_parameters") and not _is_identity(weight):
                    module.reset_parameters()
    out.mkdir(parents=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, out / "open_clip_model.safetensors", metadata={"format": "pt"})
    for path in towers.glob("*.json"):
        shutil.copy(path, out)
    config = json.loads((out / "open_clip_config.json").read_text())
    config["model_cfg"]["init_logit_scale"] = scale
    write_json(out / "open_clip_config.json", config)
    return out


def _is_identity(weight: Tensor | None) -> bool:
    square = weight is not None and weight.ndim == 2 and len(weight) == weight.shape[1]
    return square and torch.equal(weight, torch.eye(len(weight)))


class Judge:
    """F@K and mAP of trained heads; what frozen towers give for the set is computed once and kept."""

    def __init__(
        self, source: Source, towers: Path, kept: Path, *, train_image: int | None = None
    ) -> None:
        """Open the evaluation set; ``kept`` is a file, written if it is not there."""
        name = f"local-dir:{towers}"
        size = {} if train_image is None else {"force_image_size": train_image}
        model, _, transform = open_clip.create_model_and_transforms(name, **size)
        if train_image is None:
            model.lock_image_tower()
        model.lock_text_tower(freeze_layer_norm=True)
        self.prefixes = find_prefixes(model)
        install(model, self.prefixes)
        self.model = model.eval()
        dataset = build_wds_dataset(source.name, transform, "test", str(source.labelled))
        if not is_multilabel(dataset):
            raise ValueError(
                f"--data {source.name}: {source.labelled} is not multi-label (dataset_type.txt)"
            )
        self.prompts = class_prompts(dataset)
        self.images = LabelledImages(dataset, transform)
        if not kept.is_file():
            tokenizer = open_clip.get_tokenizer(name)
            made = self._encode(tokenizer, source.name)
            kept.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(kept) as file:
                torch.save(made, file)
        self.kept = torch.load(kept, weights_only=True)
        self.labels = self.kept["labels"].numpy()
        self.halves = halves(len(self.labels))

    def _encode(self, tokenizer: Callable[[list[str]], Tensor], name: str) -> dict[str, Tensor]:
        images, rows = [], []
        batches = tqdm(self.images, f"Encoding {name}'s evaluation images", unit="batch")
        for pixels, labels, _ in batches:
            if "visual" in self.prefixes:
                images.append(run_prefix(self.model, "visual", pixels))
            for true in labels:
                row = torch.zeros(len(self.prompts), dtype=torch.uint8)
                row[torch.from_numpy(true).long()] = 1
                rows.append(row)
        bar = tqdm(self.prompts, f"Encoding {name}'s class names", unit="class")
        texts = torch.cat([run_prefix(self.model, "text", tokenizer(list(texts))) for texts in bar])
        found = {"labels": torch.stack(rows), "texts": texts}
        return found | ({"images": torch.cat(images)} if images else {})

    @torch.no_grad()
    def measure(self, state: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """Metrics of a checkpoint's weights on "all" images and on the two ``halves``.

        ``mAP`` is ``mean_average_precision`` over the classes of which there are images. All are 0 of
        weights that diverged.
        """
        frozen = tuple(f"{name}." for name in self.prefixes.values())
        learned = {name: value for name, value in state.items() if not name.startswith(frozen)}
        self.model.load_state_dict(learned, strict=False)
        if "visual" in self.prefixes:
            images = self.model.encode_image(self.kept["images"], normalize=True)
        else:
            images, _ = encode_images(self.model, self.images, device="cpu")
        texts = self.model.encode_text(self.kept["texts"], normalize=True)
        means = [part.mean(dim=0) for part in texts.split([len(p) for p in self.prompts])]
        classes = F.normalize(torch.stack(means), dim=1)
        finite = bool(images.isfinite().all() and classes.isfinite().all())
        images, classes = images.nan_to_num(), classes.nan_to_num()
        found = {}
        for name, rows in {"all": np.arange(len(images)), **self.halves}.items():
            labels = self.labels[rows]
            metrics = multilabel_metrics(images[rows], classes, labels)
            share = float(labels.any(axis=0).mean())  # a class without images counts 0
            metrics["mAP"] = metrics["mean_average_precision"] / share
            found[name] = {metric: value * finite for metric, value in metrics.items()}
        return found


@contextlib.contextmanager
def quietly(*, shown: bool = False) -> Iterator[None]:
    """Keep what a command prints and logs; RuntimeError with the end of it if it fails.

    With ``shown`` progress bars and warnings are seen, what it logs beside them is not.
    """
    root, text = logging.getLogger(), io.StringIO()
    level, handlers = root.level, list(root.handlers)
    root.handlers.clear()
    try:
        with contextlib.ExitStack() as stack:
            if shown:
                logging.disable(logging.INFO)
            else:
                stack.enter_context(contextlib.redirect_stdout(text))
                stack.enter_context(contextlib.redirect_stderr(text))
            yield
    except (Exception, SystemExit) as error:
        tail = "\n".join(text.getvalue().splitlines()[-15:])
        raise RuntimeError(f"training failed: {error}\n{tail}") from error
    finally:
        logging.disable(logging.NOTSET)
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)


class Workplace:
    """Where runs are done, one at a time."""

    def __init__(self, sources: Sequence[Source], towers: Path, kept: Path, scratch: Path) -> None:
        """What towers give is kept in the folder ``kept``; ``scratch`` is in use while runs are done."""
        self.sources = {source.name: source for source in sources}
        self.towers, self.kept, self.scratch = towers.resolve(), kept.resolve(), scratch
        parts = sorted([*towers.glob("*.json"), *towers.glob("*.safetensors")])
        self.towers_digest = files_digest(parts, without=str(self.towers))
        self.code_digest = code_digest()
        self._group: tuple[Any, ...] | None = None
        self._judges: dict[tuple[str, int | None], Judge] = {}
        gc.freeze()  # collecting after each run costs less

    def key(self, run: Run) -> str:
        """Of a result: all settings, and digests of towers, data and code."""
        digests = {
            "towers": self.towers_digest,
            "files": self.sources[run.data].digest,
            "code": self.code_digest,
        }
        return json.dumps(run._asdict() | digests, sort_keys=True)

    def judge(self, data: str, train_image: int | None = None) -> Judge:
        """Of a data set; it encodes at the first call."""
        place = data, train_image
        if place not in self._judges:
            source = self.sources[data]
            name = f"{data}-{train_image or 'frozen'}-{self.towers_digest}-{source.digest}.pt"
            kept = self.kept / "evaluation" / name
            self._judges[place] = Judge(source, self.towers, kept, train_image=train_image)
        return self._judges[place]

    def _folders(self, run: Run) -> tuple[Path, Path]:
        """The run's shards and the model it starts from; runs of equal pairs share them."""
        group = run.data, run.pairs, run.noise, run.seed
        folder = self.scratch / "group"
        if group != self._group:
            shutil.rmtree(folder, ignore_errors=True)
            source = self.sources[run.data]
            drawn = draw(len(source.samples), run.pairs, run.noise, run.seed)
            source.write(folder / "pairs", drawn)
            self._group = group
        start = folder / f"start-{run.scale}"
        if not start.is_dir():
            write_start(self.towers, start, scale=run.scale, seed=run.seed)
        return folder / "pairs", start

    def command(self, run: Run, pairs: Path, start: Path, *extra: str) -> list[str]:
        """The training command's words. One epoch of steps x batch samples passes over the pairs."""
        words = [
            *("--loss", run.loss, "--model", f"local-dir:{start}"),
            *("--train-data", str(pairs / f"{{00000..{SHARDS - 1:05d}}}.tar"), "--epochs", "1"),
            *("--train-num-samples", str(run.steps * run.batch), "--batch-size", str(run.batch)),
            *("--lr", str(run.lr), "--wd", str(run.decay), "--warmup", str(run.steps // 10)),
            # open_clip's defaults depend on what the model's path looks like
            *("--beta1", "0.9", "--beta2", "0.999", "--eps", "1e-8"),
            *("--workers", "0", "--seed", str(run.seed), "--save-frequency", "0"),
            *("--logs", str(self.scratch / "logs"), "--name", "run"),
            *("--log-every-n-steps", "1000000", "--lock-text"),
            *("--lock-text-freeze-layer-norm", "--feature-cache", str(self.kept / "features")),
        ]
        if run.loss in ("kd", "otter"):
            words += ["--init-distill-logit-scale", str(run.scale)]
        image = ["--lock-image"]
        if run.train_image is not None:
            image = ["--force-image-size", str(run.train_image)]
        return [*words, *image, *run.flags, *extra]

    def do(self, run: Run, *extra: str, shown: bool = False) -> dict[str, Any]:
        """Train and measure: a JSON-able result, with ``extra`` flags beside the run's own."""
        judge, folders = self.judge(run.data, run.train_image), self._folders(run)
        logs = self.scratch / "logs"
        shutil.rmtree(logs, ignore_errors=True)
        began = time.perf_counter()
        with quietly(shown=shown):
            if train.main(self.command(run, *folders, *extra)) != 0:
                raise RuntimeError("the command returned an error")
            trained = time.perf_counter()
            path = logs / "run" / "checkpoints" / "epoch_1.pt"
            checkpoint = torch.load(path, mmap=True, weights_only=True)
            steps = {int(state["step"]) for state in checkpoint["optimizer"]["state"].values()}
            result = {
                "steps_done": max(steps),
                "student": judge.measure(checkpoint["state_dict"]),
                "logit_scale": checkpoint["state_dict"]["logit_scale"].exp().item(),
            }
            if "state_dict_ema" in checkpoint:
                result["teacher"] = judge.measure(checkpoint["state_dict_ema"])
        found = path.parent / "results.jsonl"
        if found.is_file():  # of --zeroshot-data
            result["command"] = json.loads(found.read_text().splitlines()[-1])
        result["log"] = last_logged((logs / "run" / "out.log").read_text())
        result |= {"train_seconds": trained - began, "seconds": time.perf_counter() - began}
        shutil.rmtree(logs)
        gc.collect()
        return result


def last_logged(text: str) -> dict[str, float]:
    """Figures of the last step in a training command's log: losses, statistics, seconds of a step."""
    lines = [line for line in text.splitlines() if "Train Epoch" in line]
    if not lines:
        return {}
    figures = re.findall(r"(\w+): ([\d.e+-]+) \(", lines[-1])
    seconds = re.findall(r"Batch \(t\): ([\d.]+)", lines[-1])
    found = {name.lower(): float(value) for name, value in figures}
    return found | ({"step_seconds": float(seconds[0])} if seconds else {})
