"""The command's course: read and encode, count, judge, write three files."""

from __future__ import annotations

import argparse
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
from otter_openclip.analysis.verdict import verdict
from otter_openclip.files import make_room, write_json, write_text

SHOWN = 24  # pairs in each list of the page
LISTED = 1000  # suspects in stats.json


def run(args: argparse.Namespace) -> int:
    """Write report.html, matchings.png and stats.json; returns the exit code.

    Raises:
        ValueError: if there is no such model or no such data, or fewer than two usable pairs.
        OSError: if the folder cannot be written.
    """
    output = Path(args.output)
    reader = Reader(args)
    make_room(output / "report.html")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = Model(args.model, args.pretrained, device, args.feature_cache)
    pairs = _shuffled(model.embed(reader, args.samples))
    count = len(pairs.captions)
    stats: dict[str, Any] = {
        "data": {
            "train_data": args.train_data,
            "pairs": count,
            "pairs_in_all": reader.pairs_in_all,
            "passed_over": [
                {"reason": reason, "samples": number, "first": reader.places[reason]}
                for reason, number in reader.passed_over.most_common()
            ],
        },
        "model": {"name": args.model, "pretrained": args.pretrained, "from_cache": model.cached},
    }
    sizes = sorted({size for size in args.batch_sizes if size <= count} or {count})
    notes = _notes(args, count, sizes, reader)
    total = sum(steps(count, size) for size in sizes) + 4
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
    stats["verdict"] = {**found._asdict(), "notes": notes}
    suspects = _suspects(rankings[found.judge]) if found.judge else []
    ranking = rankings.get(found.judge)
    stats["suspects"] = [_suspect(pairs, ranking, i) for i in suspects[:LISTED]]
    stats["duplicates"] = {name: _duplicates(pairs, copy) for name, copy in copies.items()}
    shown = [(i, int(ranking.other[i])) for i in suspects[:SHOWN]]
    page = render(stats, pairs, shown, copies, min(sizes))
    draw(output / "matchings.png", stats, pairs, min(sizes))
    write_json(output / "stats.json", stats)
    write_text(output / "report.html", page)
    for question, (answer, why) in (
        ("Are the captions noisy?", found.noise),
        ("Would OTTER help?", found.otter),
    ):
        print(f"{question} {answer}. {why}")
    print(*notes, sep="\n", end="\n" * bool(notes))
    print(f"Open {output / 'report.html'}; beside it are matchings.png and stats.json.")
    return 0


def _shuffled(pairs: Embedded) -> Embedded:
    """In an order drawn by lot, the same each time: neighbours in the data are often alike."""
    order = torch.randperm(len(pairs.captions), generator=torch.Generator().manual_seed(0))
    images, texts, *shown = pairs
    numbers = order.tolist()
    return Embedded(
        images[order], texts[order], *([column[i] for i in numbers] for column in shown)
    )


def _notes(args: argparse.Namespace, count: int, sizes: list[int], reader: Reader) -> list[str]:
    """What is other than was asked for."""
    notes = []
    if count < args.samples:
        notes.append(f"{count:,} pairs could be used, {args.samples:,} were asked for.")
    if left_out := sorted(set(args.batch_sizes) - set(sizes)):
        listed = ", ".join(f"{size:,}" for size in left_out)
        instead = f"; one batch of all {count:,} takes their place" if sizes == [count] else ""
        notes.append(f"Too few pairs for batches of {listed}{instead}.")
    if passed := sum(reader.passed_over.values()):
        reason, number = reader.passed_over.most_common(1)[0]
        notes.append(f"{passed:,} samples were passed over, most often ({number:,}): {reason}.")
    return notes


def _suspects(ranking: Ranking) -> list[int]:
    """Captions whose own picture is in the far part, those first that another fits better by most."""
    margin = ranking.best - ranking.own
    order = margin.argsort(descending=True).tolist()
    return [i for i in order if ranking.rank[i] > FAR]


def _suspect(pairs: Embedded, ranking: Ranking, i: int) -> dict[str, Any]:
    other = int(ranking.other[i])
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
