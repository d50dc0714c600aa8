"""The ``fit`` command's course: features, heads, weights, the folder with its list and page."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from otter_openclip.closed_form.blocks import Rows, ShardPairs, Unpaired
from otter_openclip.closed_form.choosing import SETTINGS
from otter_openclip.closed_form.course import EPSILON, Fit, Options, Statistics
from otter_openclip.closed_form.headed_model import takes_off_a_mean, with_heads
from otter_openclip.closed_form.heads import Heads
from otter_openclip.closed_form.listing import WrongPair, better_captions, contents, judge_shards
from otter_openclip.closed_form.page import page
from otter_openclip.closed_form.two_towers import Towers
from otter_openclip.closed_form.validation import LabelledFeatures
from otter_openclip.evaluation.run import join_ranks
from otter_openclip.evaluation.validator import check_webdataset
from otter_openclip.frozen.encode import Column, fill
from otter_openclip.model_folders.folder import check_out, write_folder
from otter_openclip.pages import SHOWN
from otter_openclip.shards.names import shard_names

FIT_FILE, REPORT_FILE, WEIGHTS_FOLDER = "fit.json", "report.html", "pair_weights"


def fit_folder(
    out: str | Path,
    *,
    model: str,
    train_data: str,
    feature_cache: str | Path | None = None,
    val: str | None = None,
    unpaired_images: str | None = None,
    unpaired_captions: str | None = None,
    embed_dim: int | None = None,
    no_weights: bool = False,
    transport_pairs: bool = False,
    sinkhorn_lambda: float = EPSILON,
    keep_text_mean: bool = False,
    precision: str | None = None,
    workers: int = 1,
    device: str | None = None,
    overwrite: bool = False,
    together: bool = True,
    report: Callable[[str], None] = logging.info,
) -> Path:
    """Write the towers of ``model`` under fitted heads as a folder for stock open_clip.

    The arguments are the command's, see its ``--help``. If the processes of torchrun work ``together``,
    all of them call it.

    Returns:
        The folder.

    Raises:
        ValueError: for towers, pairs or settings that cannot be used.
        FileExistsError: if ``out`` exists and is not to be overwritten.
        OSError: if something else cannot be read or written.
        RuntimeError: if what open_clip loads from the written folder is not what was fitted.
    """
    out = Path(out)
    folder = Path(feature_cache or f"{out}.features")
    inputs = [Path(name) for name in (model.removeprefix("local-dir:"), val) if name is not None]
    check_out(out, overwrite, folder, *filter(Path.exists, inputs))
    if (unpaired_images is None) != (unpaired_captions is None):
        raise ValueError("--unpaired-images and --unpaired-captions go together: give both or none")
    if val is not None:
        check_webdataset(val, flag="--val")
    rank, world_size = join_ranks() if together else (0, 1)
    towers = Towers(model, folder, precision, device)
    if not keep_text_mean and not takes_off_a_mean(towers):
        raise ValueError(
            f"--model {model}: no bias of its text tower can take the features' mean off; pass "
            "--keep-text-mean, which fits heads that need none"
        )
    how = {"device": towers.device, "rank": rank, "world_size": world_size}
    shards = shard_names("--train-data", train_data)
    filling = {**how, "workers": workers}
    fill([towers.images, towers.texts], shards, **filling)
    pairs = ShardPairs(towers.images.files, towers.texts.files, shards, **how)
    unpaired = labelled = None
    if unpaired_images is not None:
        images = _rows(towers.images, "--unpaired-images", unpaired_images, filling)
        unpaired = Unpaired(images, _captions(towers, unpaired_captions, filling))
    if val is not None:
        labelled = LabelledFeatures(val, towers, **filling)
    options = Options(
        weights=not no_weights,
        embed_dim=embed_dim,
        transport_pairs=transport_pairs,
        epsilon=sinkhorn_lambda,
        text_mean=not keep_text_mean,
    )
    fit = Fit(pairs, options)
    heads, statistics = fit.run(unpaired)
    if labelled is not None:
        best = max(SETTINGS, key=lambda each: labelled.precision(fit.heads(each).cpu()))
        heads, (_, scale, likelihood) = fit.heads(best), fit.likeliest([best])
        chosen = {"setting": best, "logit_scale": scale, "log_likelihood": likelihood}
        statistics = statistics._replace(**chosen)
    heads = heads.cpu()
    files, wrong = {}, []
    if statistics.wrong is not None:
        files, wrong = judge_shards(fit, pairs, WEIGHTS_FOLDER)
    if rank == 0:
        record = {
            "model": model,
            "train_data": train_data,
            "unpaired": [unpaired_images, unpaired_captions],
            "transport_pairs": transport_pairs,
            **_record(heads, statistics, wrong),
            "left_out": pairs.count - statistics.pairs,
        }
        if labelled is not None:
            record["val"] = labelled.metrics(heads)
        files |= _documents(record, statistics, pairs, heads, wrong)
        fitted, config = with_heads(towers, heads, statistics.logit_scale)
        write_folder(out, fitted, config, fitted.state_dict(), towers.tokenizer, files)
        _say(out, record, report)
    return out


def _rows(column: Column, flag: str, shards: str, ranks: dict[str, Any]) -> Rows:
    urls = shard_names(flag, shards)
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
    return Rows([towers.text_features(texts).numpy()[:, None]], ranks["device"])


def _record(heads: Heads, statistics: Statistics, wrong: list[WrongPair]) -> dict[str, Any]:
    """What fit.json says of the fit itself."""
    record = {
        "pairs": statistics.pairs,
        "embed_dim": heads.image_weight.shape[1],
        **statistics.setting._asdict(),
        "logit_scale": statistics.logit_scale,
        "log_likelihood": statistics.log_likelihood,
        "correlations": [round(float(each), 6) for each in heads.correlations],
    }
    if (estimate := statistics.wrong) is not None:
        share, error = estimate.share, estimate.error
        low, high = max(0.0, share - 2 * error), min(1.0, share + 2 * error)
        record |= {
            "wrong_share": share,
            "wrong_share_interval": [low, high],
            "pair_weights": WEIGHTS_FOLDER,
            "wrong": [
                {
                    "shard": pair.place[0],
                    "key": pair.key,
                    "weight": round(pair.weight, 4),
                    "similarity": round(pair.similarity, 4),
                }
                for pair in wrong
            ],
        }
    return record


def _documents(
    record: dict[str, Any],
    statistics: Statistics,
    pairs: ShardPairs,
    heads: Heads,
    wrong: list[WrongPair],
) -> dict[str, bytes]:
    """fit.json and report.html."""
    shown = wrong[:SHOWN]
    better = better_captions(pairs, heads, shown)
    samples = contents([pair.place for pair in shown] + [place for row in better for place in row])
    return {
        FIT_FILE: (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode(),
        REPORT_FILE: page(record, statistics.wrong, shown, better, samples).encode(),
    }


def _say(out: Path, record: dict[str, Any], report: Callable[[str], None]) -> None:
    report(
        f"{record['pairs']:,} pairs: ridges {record['ridge_images']:g} and {record['ridge_texts']:g}, "
        f"power {record['power']:g}, {record['embed_dim']} dimensions, "
        f"scale {record['logit_scale']:g}"
    )
    if "wrong_share" in record:
        low, high = record["wrong_share_interval"]
        report(
            f"Pairs that look wrong: {record['wrong_share']:.0%} ({low:.0%} to {high:.0%}), "
            f"{len(record['wrong']):,} of them are listed in {out / FIT_FILE}"
        )
    if "val" in record:
        report(f"--val: mean average precision {record['val']['mean_average_precision']:.4f}")
    report(f"Wrote {out}; open {out / REPORT_FILE}")
    report(f"  open_clip.create_model_and_transforms('local-dir:{out}')")
