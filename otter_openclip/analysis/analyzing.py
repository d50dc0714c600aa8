"""The command's course: read and encode, count, judge, write three files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from otter_openclip.analysis.embedding import Embedded, Model
from otter_openclip.analysis.matching import batch_statistics, steps
from otter_openclip.analysis.neighbours import (
    FAR,
    NEAR,
    Duplicates,
    Ranking,
    by_neighbours,
    by_similarity,
    duplicates,
)
from otter_openclip.analysis.page import render
from otter_openclip.analysis.pictures import draw
from otter_openclip.analysis.reading import Reader
from otter_openclip.analysis.verdict import Verdict, verdict
from otter_openclip.files import make_room, write_json, write_text

SHOWN = 24  # pairs in each list of the page
LISTED = 1000  # suspects in stats.json


def run(args: argparse.Namespace) -> int:
    """Write report.html, matchings.png and stats.json; returns the exit code.

    Raises:
        ValueError: if there is no such model, there are no such data, or a batch is of one.
        OSError: if the folder cannot be written.
    """
    output = Path(args.output)
    if min(args.batch_sizes) < 2:
        raise ValueError("--batch-sizes: a batch of 1 has nothing to match; take 2 or more")
    reader = Reader(args)
    make_room(output / "report.html")
    model = Model(args.model, args.pretrained, _device(args.device), args.feature_cache)
    pairs = model.embed(reader, args.samples)
    data = {
        "train_data": args.train_data,
        "pairs": len(pairs.captions),
        "pairs_in_all": reader.pairs_in_all,
        "passed_over": [
            {"reason": reason, "samples": number, "first": reader.places[reason]}
            for reason, number in reader.passed_over.most_common()
        ],
    }
    about = {"name": args.model, "pretrained": args.pretrained, "from_cache": model.cached}
    sizes = sorted({size for size in args.batch_sizes if size <= data["pairs"]} or {data["pairs"]})
    notes = _notes(args, data, sizes)
    found = report(output, pairs, {"data": data, "model": about, "notes": notes}, sizes)
    for question, (answer, why) in (
        ("Are the captions noisy?", found.noise),
        ("Would OTTER help?", found.otter),
    ):
        print(f"{question} {answer}. {why}")
    print(*notes, sep="\n", end="\n" * bool(notes))
    print(f"Open {output / 'report.html'}; beside it are matchings.png and stats.json.")
    return 0


def _device(name: str | None) -> str:
    """The device ``--device`` names, or that there is."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # no such kind, none there
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"--device {name} cannot be used: {reason[:200]}") from error
    return name


def report(output: Path, pairs: Embedded, stats: dict[str, Any], sizes: Sequence[int]) -> Verdict:
    """Write the three files into the folder ``output``.

    Args:
        output: that is there.
        pairs: at least two.
        stats: the entries "data", "model" and "notes" of stats.json; the others are added.
        sizes: of batches, growing, none larger than ``pairs``.
    """
    pairs = _shuffled(pairs)
    total = sum(steps(len(pairs.captions), size) for size in sizes) + 4
    with tqdm(total=total, desc="Matching", unit="step") as bar:
        rankings = {}
        for name, rank in (("similarity", by_similarity), ("neighbours", by_neighbours)):
            rankings[name] = rank(pairs.images, pairs.texts)
            bar.update()
        texts = [" ".join(caption.casefold().split()) for caption in pairs.captions]
        copies = {}
        for name, features, names in (
            ("captions", pairs.texts, texts),
            ("pictures", pairs.images, pairs.keys),
        ):
            copies[name] = duplicates(features, names, SHOWN)
            bar.update()
        stats["batches"] = {
            str(size): batch_statistics(pairs.images, pairs.texts, size, bar.update)
            for size in sizes
        }
    stats["ranks"] = {name: ranking.statistics() for name, ranking in rankings.items()}
    found = verdict(stats)
    stats["verdict"] = found._asdict()
    suspects: list[tuple[int, int]] = []
    if ranking := rankings.get(found.judge):
        suspects = _suspects(ranking)
        stats["suspects"] = [_suspect(pairs, ranking, *pair) for pair in suspects]
    stats["duplicates"] = {name: _duplicates(pairs, copy) for name, copy in copies.items()}
    page = render(stats, pairs, suspects[:SHOWN], copies, sizes[0])
    draw(output / "matchings.png", stats, pairs, sizes[0])
    write_json(output / "stats.json", stats)
    write_text(output / "report.html", page)
    return found


def _shuffled(pairs: Embedded) -> Embedded:
    """In an order drawn by lot, the same each time: neighbours in the data are often alike."""
    order = torch.randperm(len(pairs.captions), generator=torch.Generator().manual_seed(0))
    images, texts, *shown = pairs
    numbers = order.tolist()
    return Embedded(
        images[order], texts[order], *([column[i] for i in numbers] for column in shown)
    )


def _notes(args: argparse.Namespace, data: dict[str, Any], sizes: list[int]) -> list[str]:
    """What is other than was asked for."""
    notes, count = [], data["pairs"]
    if count < args.samples:
        notes.append(f"{count:,} pairs could be used, {args.samples:,} were asked for.")
    if left_out := sorted(set(args.batch_sizes) - set(sizes)):
        listed = ", ".join(f"{size:,}" for size in left_out)
        instead = f"; one batch of all {count:,} takes their place" if sizes == [count] else ""
        notes.append(f"Too few pairs for batches of {listed}{instead}.")
    if passed := sum(found["samples"] for found in data["passed_over"]):
        most = data["passed_over"][0]
        often = f"most often ({most['samples']:,}): {most['reason']}"
        notes.append(f"{passed:,} samples were passed over, {often}.")
    return notes


def _suspects(ranking: Ranking) -> list[tuple[int, int]]:
    """Captions whose own picture is in the far part, with the picture that fits them best.

    Those come first that the other fits better by most.
    """
    order = (ranking.best - ranking.own).argsort(descending=True).tolist()
    far = [i for i in order if ranking.rank[i] > FAR]
    return [(i, int(ranking.other[i])) for i in far[:LISTED]]


def _suspect(pairs: Embedded, ranking: Ranking, i: int, other: int) -> dict[str, Any]:
    return {
        "place": pairs.places[i],
        "caption": pairs.captions[i],
        "pictures_that_fit_better": round(float(ranking.rank[i]) * (len(pairs.captions) - 1)),
        "score": float(ranking.own[i]),
        "best_score": float(ranking.best[i]),
        "best_place": pairs.places[other],
    }


def _duplicates(pairs: Embedded, copies: Duplicates) -> dict[str, Any]:
    return {
        "equal_share": copies.equal_share,
        "near_share": copies.near_share,
        "near_means_cosine": NEAR,
        "groups": [[pairs.places[i] for i in group[:SHOWN]] for group in copies.groups],
        "pairs": [[value, pairs.places[i], pairs.places[j]] for value, i, j in copies.pairs],
    }
