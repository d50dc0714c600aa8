"""The ``fit`` command's course: features, heads, weights, the folder with its list and page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip_train.data import expand_urls

from otter_openclip.closed_form.choosing import SETTINGS
from otter_openclip.closed_form.course import Fit, Options, Statistics
from otter_openclip.closed_form.headed_model import check_towers, takes_off_a_mean, with_heads
from otter_openclip.closed_form.heads import Heads
from otter_openclip.closed_form.labelled import LabelledFeatures
from otter_openclip.closed_form.listing import better_captions, contents, judge_shards
from otter_openclip.closed_form.page import SHOWN, page
from otter_openclip.closed_form.pairs import Rows, ShardPairs, Unpaired
from otter_openclip.evaluation.run import join_ranks
from otter_openclip.frozen.encode import Column, TowerEncoder, fill
from otter_openclip.frozen.loader import image_column, text_column
from otter_openclip.frozen.prefix import inner_parts, install
from otter_openclip.model_folders.folder import PROBE_TEXTS, check_out, write_folder

FIT_FILE, REPORT_FILE, WEIGHTS_FOLDER = "fit.json", "report.html", "pair_weights"
_TEXTS = 256  # captions of a file that are encoded at a time


class Towers:
    """The two pretrained towers, and the columns that keep what they give."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        """Load ``--model``; ValueError if it is not two towers."""
        self.name = args.model
        if Path(self.name).is_dir():
            self.name = f"local-dir:{self.name}"
        try:
            model, _, transform = open_clip.create_model_and_transforms(self.name, device=device)
        except RuntimeError as error:  # open_clip's own of an unknown model
            raise ValueError(f"--model {args.model}: {error}") from error
        check_towers(model, args.model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(self.name)
        self.config = open_clip.get_model_config(self.name)
        parts = inner_parts(model)
        install(model, parts)
        folder = Path(args.feature_cache or f"{args.out}.features")
        common = {"device": device, "precision": args.precision}
        self.images = image_column(model, parts["visual"], folder, transform, **common)
        self.texts = text_column(model, parts["text"], folder, self.tokenizer, **common)
        self.encode_texts = TowerEncoder(model, "text", parts["text"], device, args.precision)

    def probes(self) -> torch.Tensor:
        """Tokens of some texts."""
        return self.tokenizer(PROBE_TEXTS)


def run(args: argparse.Namespace) -> int:
    """Fit and write ``OUT``; returns the exit code.

    Raises:
        ValueError: for towers, pairs or settings that cannot be used.
        OSError: if something cannot be read or written.
    """
    out = Path(args.out)
    check_out(out, args.overwrite)
    if (args.unpaired_images is None) != (args.unpaired_captions is None):
        raise ValueError("--unpaired-images and --unpaired-captions go together: give both or none")
    rank, world_size = join_ranks()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    towers = Towers(args, device)
    if not args.keep_text_mean and not takes_off_a_mean(towers.model, towers.probes()):
        raise ValueError(
            f"--model {args.model}: no bias of its text tower can take the features' mean off; pass "
            "--keep-text-mean, which fits heads that need none"
        )
    ranks = {"device": device, "rank": rank, "world_size": world_size, "workers": args.workers}
    shards = _shards("--train-data", args.train_data)
    fill([towers.images, towers.texts], shards, **ranks)
    place = {"device": device, "rank": rank, "world_size": world_size}
    pairs = ShardPairs(towers.images.files, towers.texts.files, shards, **place)
    unpaired = None
    if args.unpaired_images is not None:
        unpaired = Unpaired(
            _rows(towers.images, "--unpaired-images", args.unpaired_images, ranks),
            _captions(towers, args.unpaired_captions, ranks),
        )
    labelled = None
    if args.val is not None:
        how = (towers.model, towers.tokenizer, towers.images)
        labelled = LabelledFeatures(args.val, *how, **ranks)
    fit, heads, statistics = _fit(args, pairs, unpaired, labelled)
    files, wrong = {}, []
    if statistics.wrong is not None:
        files, wrong = judge_shards(fit, pairs, WEIGHTS_FOLDER)
    if rank == 0:
        record = _record(args, pairs, heads, statistics, wrong)
        if labelled is not None:
            record["val"] = labelled.metrics(heads)
        _write(out, towers, pairs, heads, record, files, wrong, statistics)
        _say(out, record)
    return 0


def _fit(
    args: argparse.Namespace,
    pairs: ShardPairs,
    unpaired: Unpaired | None,
    labelled: LabelledFeatures | None,
) -> tuple[Fit, Heads, Statistics]:
    options = Options(
        weights=not args.no_weights,
        embed_dim=args.embed_dim,
        transport_pairs=args.transport_pairs,
        epsilon=args.sinkhorn_lambda,
        text_mean=not args.keep_text_mean,
    )
    fit = Fit(pairs, options)
    heads, statistics = fit.run(unpaired)
    if labelled is None:
        return fit, heads, statistics

    def precision(number: int) -> float:
        return labelled.metrics(fit.heads(SETTINGS[number]))["mean_average_precision"]

    best = SETTINGS[max(range(len(SETTINGS)), key=precision)]
    return fit, fit.heads(best), statistics._replace(setting=best)


def _shards(flag: str, shards: str) -> list[str]:
    if shards.endswith((".csv", ".tsv")):
        raise ValueError(
            f"{flag} {shards} is a table; build shards of it with otter-openclip data csv"
        )
    return list(dict.fromkeys(expand_urls(shards)[0]))


def _rows(column: Column, flag: str, shards: str, ranks: dict[str, Any]) -> Rows:
    urls = _shards(flag, shards)
    fill([column], urls, **ranks)
    rows = Rows([column.files.read(url) for url in urls], ranks["device"])
    if not len(rows):
        raise ValueError(f"{flag} {shards} has no samples")
    return rows


def _captions(towers: Towers, source: str, ranks: dict[str, Any]) -> Rows:
    """Features of a text file's lines, or of shards' captions."""
    if not Path(source).is_file() or source.endswith(".tar"):
        return _rows(towers.texts, "--unpaired-captions", source, ranks)
    lines = Path(source).read_text(encoding="utf-8").splitlines()
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"--unpaired-captions {source} has no line of text")
    batches = [texts[i : i + _TEXTS] for i in range(0, len(texts), _TEXTS)]
    features = [towers.encode_texts(towers.tokenizer(batch)).float().numpy() for batch in batches]
    return Rows([np.concatenate(features)[:, None]], ranks["device"])


def _record(
    args: argparse.Namespace,
    pairs: ShardPairs,
    heads: Heads,
    statistics: Statistics,
    wrong: list[Any],
) -> dict[str, Any]:
    """What fit.json says."""
    record = {
        "model": args.model,
        "train_data": args.train_data,
        "pairs": statistics.pairs,
        "left_out": pairs.count - statistics.pairs,
        "embed_dim": heads.image_weight.shape[1],
        **statistics.setting._asdict(),
        "logit_scale": statistics.logit_scale,
        "log_likelihood": statistics.log_likelihood,
        "unpaired": [args.unpaired_images, args.unpaired_captions],
        "transport_pairs": args.transport_pairs,
        "correlations": [round(float(each), 6) for each in heads.correlations],
    }
    if (found := statistics.wrong) is not None:
        low, high = max(0.0, found.share - 2 * found.error), min(1.0, found.share + 2 * found.error)
        record |= {
            "wrong_share": found.share,
            "wrong_share_interval": [low, high],
            "pair_weights": WEIGHTS_FOLDER,
            "wrong": [
                {
                    "shard": shard,
                    "key": key,
                    "weight": round(weight, 4),
                    "similarity": round(own, 4),
                }
                for shard, _, key, weight, own in wrong
            ],
        }
    return record


def _write(
    out: Path,
    towers: Towers,
    pairs: ShardPairs,
    heads: Heads,
    record: dict[str, Any],
    files: dict[str, bytes],
    wrong: list[Any],
    statistics: Statistics,
) -> None:
    model, config = with_heads(
        towers.model,
        towers.config,
        dict(towers.model.visual.preprocess_cfg),
        heads,
        statistics.logit_scale,
        towers.probes(),
    )
    shown = wrong[:SHOWN]
    better = better_captions(pairs, heads, shown)
    samples = contents([pair[:2] for pair in shown] + [place for row in better for place in row])
    files = {
        **files,
        FIT_FILE: (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode(),
        REPORT_FILE: page(record, statistics.wrong, shown, better, samples).encode(),
    }
    write_folder(out, model, config, model.state_dict(), towers.tokenizer, files)


def _say(out: Path, record: dict[str, Any]) -> None:
    print(
        f"{record['pairs']:,} pairs: ridges {record['ridge_images']:g} and {record['ridge_texts']:g}, "
        f"power {record['power']:g}, {record['embed_dim']} dimensions, "
        f"scale {record['logit_scale']:g}"
    )
    if "wrong_share" in record:
        low, high = record["wrong_share_interval"]
        print(
            f"Pairs that look wrong: {record['wrong_share']:.0%} ({low:.0%} to {high:.0%}), "
            f"{len(record['wrong']):,} of them are listed in {out / FIT_FILE}"
        )
    if "val" in record:
        print(f"--val: mean average precision {record['val']['mean_average_precision']:.4f}")
    print(f"Wrote {out}; open {out / REPORT_FILE}")
    print(f"  open_clip.create_model_and_transforms('local-dir:{out}')")
