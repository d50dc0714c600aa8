"""Figures of a comparison: a row for each method, differences seed by seed, the verdict."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from otter_openclip.compare.trial import FIT, METRICS, label

Results = Mapping[tuple[str, int], Mapping[str, Any]]  # by method and seed, as trials give them


def mean_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the sample's standard deviation, 0 of one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), deviation


def table(results: Results, reported: str, chosen_by: str) -> list[dict[str, Any]]:
    """A row for each method, best first by its mean on ``chosen_by``; figures, of ``reported``, in percent.

    Differences are to InfoNCE, or where that is not compared to the first method, seed by seed.
    """
    methods = list(dict.fromkeys(method for method, _ in results))
    base = "infonce" if "infonce" in methods else methods[0]
    seeds = sorted({seed for _, seed in results})
    rows = []
    for method in methods:
        own = {s: r for (m, s), r in results.items() if m == method}
        if method == FIT:  # it has nothing that is drawn
            own = dict.fromkeys(seeds, own[0])
        values = {s: 100 * r["metrics"][reported]["mAP"] for s, r in own.items()}
        paired = [
            value - 100 * results[base, s]["metrics"][reported]["mAP"]
            for s, value in values.items()
            if (base, s) in results
        ]
        row = {"method": method, "label": label(method), "seeds": len(values), "base": label(base)}
        for name in METRICS:
            row[name] = mean_deviation([100 * r["metrics"][reported][name] for r in own.values()])
        if method != base and paired:
            row |= {"difference": mean_deviation(paired), "ahead": sum(x > 0 for x in paired)}
        row["of"] = len(paired)
        row["choosing"] = mean_deviation([100 * r["metrics"][chosen_by]["mAP"] for r in own.values()])[0]
        row["course"] = [
            (at[0][0], statistics.fmean(100 * each[1][reported] for each in at))
            for at in zip(*(r["course"] for r in own.values()), strict=True)
        ]
        rows.append(row)
    return sorted(rows, key=lambda row: -row["choosing"])


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on the first of the rows."""
    best = rows[0]
    value = f"mAP {best['mAP'][0]:.1f}"
    if "difference" not in best:
        others = [row for row in rows if "difference" in row]
        if not others:
            return f"{best['label']} alone was compared: {value}."
        second = others[0]
        mean, deviation = second["difference"]
        return (
            f"Nothing was better than {best['label']}, {value}; {second['label']} comes next, "
            f"{mean:+.1f} ± {deviation:.1f}, ahead with {second['ahead']} of {second['of']} seeds."
        )
    mean, deviation = best["difference"]
    sure = best["ahead"] in (0, best["of"]) and best["of"] > 1
    doubt = "" if sure else " That may be chance."
    return (
        f"Best is {best['label']}, {value}: {mean:+.1f} ± {deviation:.1f} against {best['base']}, "
        f"ahead with {best['ahead']} of {best['of']} seeds.{doubt}"
    )
