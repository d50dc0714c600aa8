"""The command's course: read and encode, count, judge, write report.html and stats.json."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from otter_openclip.analysis.duplicates import NEAR, Duplicates, duplicates, own_is_nearest
from otter_openclip.analysis.embedding import Embedded, embed, load_model
from otter_openclip.analysis.matching import batch_statistics, in_batches
from otter_openclip.analysis.reading import Reader
from otter_openclip.analysis.verdict import Verdict, verdict
from otter_openclip.captions import cut_alike
from otter_openclip.closed_form.estimator import fit_heads
from otter_openclip.closed_form.listing import WRONG
from otter_openclip.closed_form.page import similarity_chart
from otter_openclip.files import make_room, write_json, write_text
from otter_openclip.losses import DistillationLoss, OtterLoss
from otter_openclip.pages import SHOWN, address, shortened, templates

LISTED = 1000  # suspects in stats.json
_EXAMPLES, _TOP = 8, 3  # pictures whose targets are listed, and captions of each


def run(args: argparse.Namespace) -> int:
    """Write report.html and stats.json; returns the exit code."""
    output = Path(args.output)
    reader = Reader(args.train_data, args.samples)
    make_room(output / "report.html")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(args.model, args.pretrained, device)
    pairs = embed(loaded, reader, args.samples, args.feature_cache)
    cut = cut_alike("captions", pairs.captions, loaded.tokenizer)
    data = {
        "train_data": args.train_data,
        "pairs": len(pairs.captions),
        "pairs_in_all": reader.pairs_in_all,
        "passed_over": [
            {"reason": reason, "samples": number}
            for reason, number in reader.passed_over.most_common()
        ],
    }
    model = {"name": args.model, "pretrained": args.pretrained}
    sizes = sorted({size for size in args.batch_sizes if size <= data["pairs"]} or {data["pairs"]})
    notes = [*([cut] if cut else []), *_notes(args, data, sizes)]
    judged = report(output, pairs, {"data": data, "model": model, "notes": notes}, sizes)
    print(f"Are the captions noisy? {judged.noise[0]}. {judged.noise[1]}")
    print(f"Would OTTER help? {judged.otter[0]}. {judged.otter[1]}")
    for note in notes:
        print(note)
    print(f"Open {output / 'report.html'}; beside it is stats.json.")
    return 0


def report(output: Path, pairs: Embedded, stats: dict[str, Any], sizes: Sequence[int]) -> Verdict:
    """Write the two files of at least two pairs into the folder ``output``, which is there.

    ``stats`` are the entries "data", "model" and "notes" of stats.json, to which the others are added;
    no batch of ``sizes`` is larger than ``pairs``.
    """
    pairs = _shuffled(pairs)
    texts = [" ".join(caption.casefold().split()) for caption in pairs.captions]
    copies = {
        "captions": duplicates(pairs.texts, texts, SHOWN),
        "pictures": duplicates(pairs.images, pairs.digests, SHOWN),
    }
    stats["batches"] = {
        str(size): batch_statistics(pairs.images, pairs.texts, size)
        for size in tqdm(sizes, desc="Matching", unit="batch size")
    }
    stats["wrong"], stats["suspects"], chart = _wrong(pairs)
    judged = verdict(stats)
    stats["verdict"] = judged._asdict()
    stats["duplicates"] = {name: _duplicates(pairs, copy) for name, copy in copies.items()}
    write_json(output / "stats.json", stats)
    write_text(output / "report.html", _page(stats, pairs, copies, chart))
    return judged


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
    for entry in data["passed_over"][:1]:
        notes.append(
            f"Samples were passed over, most often ({entry['samples']:,}): {entry['reason']}."
        )
    return notes


def _wrong(pairs: Embedded) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """The estimate of ``fit`` under this model, the pairs that look wrong, and a picture of both.

    What stands in the way of an estimate is its entry "fault".
    """
    try:
        model, weights, statistics = fit_heads(pairs.images, pairs.texts)
    except ValueError as error:
        return {"fault": str(error)}, [], ""
    wrong = statistics.wrong
    estimate = {
        "share": wrong.share,
        "standard_error": wrong.error,
        "own_is_nearest": own_is_nearest(pairs.images, pairs.texts),
    }
    images, texts = model.transform(pairs.images, pairs.texts)
    order = weights.argsort().tolist()[:LISTED]
    suspects = []
    for i in (i for i in order if weights[i] < WRONG):
        scores = images @ texts[i]
        own = float(scores[i])
        scores[i] = -torch.inf
        best = int(scores.argmax())
        suspects.append(
            {
                "number": i,
                "place": pairs.places[i],
                "caption": pairs.captions[i],
                "weight": float(weights[i]),
                "similarity": own,
                "best": best,
                "best_similarity": float(scores[best]),
                "best_place": pairs.places[best],
            }
        )
    return estimate, suspects, similarity_chart(wrong)


def _duplicates(pairs: Embedded, copies: Duplicates) -> dict[str, Any]:
    return {
        "equal_share": copies.equal_share,
        "near_share": copies.near_share,
        "near_means_cosine": NEAR,
        "groups": [[pairs.places[i] for i in group[:SHOWN]] for group in copies.groups],
        "pairs": [[value, pairs.places[i], pairs.places[j]] for value, i, j in copies.pairs],
    }


def _page(stats: dict[str, Any], pairs: Embedded, copies: dict[str, Duplicates], chart: str) -> str:
    """``report.jinja`` filled in; ``chart`` is of the similarities."""
    environment = templates(__file__)
    environment.filters |= {"percent": _percent, "number": _number, "shortened": shortened}
    size = min(map(int, stats["batches"]))
    return environment.get_template("report.jinja").render(
        stats=stats,
        verdict=stats["verdict"],
        pairs=pairs,
        pictures=[address(thumbnail) for thumbnail in pairs.thumbnails],
        suspects=stats["suspects"][:SHOWN],
        chart=chart,
        copies=copies,
        size=size,
        examples=_examples(pairs, size),
    )


def _examples(pairs: Embedded, size: int) -> list[dict[str, Any]]:
    """Of pictures of the first batch, from the most concentrated plan to the most spread."""
    batch = in_batches(pairs.images, pairs.texts, size)[0]
    matching = DistillationLoss().targets(*batch)[0]
    plan = OtterLoss().targets(*batch)[0]
    order = plan.amax(dim=1).argsort(descending=True)
    chosen = order[torch.linspace(0, size - 1, min(_EXAMPLES, size)).long()].tolist()
    return [
        {"number": i, "lists": [("KD", _top(matching[i])), ("OTTER", _top(plan[i]))]}
        for i in chosen
    ]


def _top(row: Tensor) -> list[tuple[int, float]]:
    masses, places = row.topk(min(_TOP, len(row)))
    return list(zip(places.tolist(), masses.tolist(), strict=True))


def _percent(share: float) -> str:
    """In percent, with a digit behind the point where that says more."""
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.1%}"


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:.1e}"
