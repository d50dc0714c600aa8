"""Tables, plots and figures of ``benchmarks.data_efficiency``, of the results there are so far."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.efficiency_runs import Run
from otter_openclip.files import write_json, write_text, written_whole

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Found = Sequence[tuple[Run, dict[str, Any]]]

NAMES = {"infonce": "InfoNCE", "ls": "LS", "kd": "KD", "otter": "OTTER"}
COLOURS = {"infonce": "#8a8f98", "ls": "#d9a441", "kd": "#4f8fc0", "otter": "#c2452d"}
METRICS = {f"F@{k}": f"flat_hit@{k}" for k in (1, 2, 5, 10)} | {"mAP": "mAP"}
SHOWN = ("mAP", "F@1")  # in the plots
ORDER = {loss: place for place, loss in enumerate(NAMES)}
NAME = "data_efficiency"


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the sample's standard deviation, 0 of one value; to a thousandth."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return round(statistics.fmean(values), 3), round(deviation, 3)


def rows(found: Found, base: Found = ()) -> list[dict[str, Any]]:
    """A row for each setting, over its seeds: percents of the test half as (mean, deviation).

    With ``base`` also the mAP less that of the run of ``base`` on the same pairs, seed by seed.
    """
    cells: dict[Run, list[dict[str, Any]]] = defaultdict(list)
    gains: dict[Run, list[float]] = defaultdict(list)
    bases = {run[:4]: result["student"]["test"]["mAP"] for run, result in base}
    for run, result in found:
        cells[run._replace(seed=-1)].append(result)
        if run[:4] in bases:
            gain = result["student"]["test"]["mAP"] - bases[run[:4]]
            gains[run._replace(seed=-1)].append(100 * gain)
    table = []
    for run, results in cells.items():
        row = {k: v for k, v in run._asdict().items() if k != "seed"} | {"seeds": len(results)}
        for name, metric in METRICS.items():
            row[name] = mean_std([100 * r["student"]["test"][metric] for r in results])
        if all("teacher" in r for r in results):
            row["teacher mAP"] = mean_std([100 * r["teacher"]["test"]["mAP"] for r in results])
        for name in ("target_entropy", "target_top_share", "distill_scale"):
            if values := [r["log"][name] for r in results if name in r["log"]]:
                row[name] = statistics.fmean(values)
        if gains[run]:
            row["mAP gained"] = mean_std(gains[run])
        row["logit_scale"] = statistics.fmean(r["logit_scale"] for r in results)
        table.append(row)
    return table


def differences(found: Found, metric: str, other: str) -> list[dict[str, Any]]:
    """OTTER's metric minus that of the loss ``other``, seed by seed, in points, for each cell."""
    cells: dict[tuple, dict[tuple[int, str], float]] = defaultdict(dict)
    for run, result in found:
        value = 100 * result["student"]["test"][METRICS[metric]]
        cells[run.data, run.noise, run.pairs][run.seed, run.loss] = value
    table = []
    for (data, noise, pairs), values in cells.items():
        seeds = [seed for seed, loss in values if loss == "otter" and (seed, other) in values]
        if seeds:
            gains = [values[seed, "otter"] - values[seed, other] for seed in seeds]
            table.append(
                {
                    **{"data": data, "noise": noise, "pairs": pairs, "seeds": len(seeds)},
                    **{"gain": mean_std(gains), "ahead": sum(gain > 0 for gain in gains)},
                }
            )
    return table


def by_title(found: dict[str, Found]) -> dict[str, Found]:
    """Results over pairs and noise: of each data set, then what was tuned or judged elsewhere."""
    final = found.get("final", [])
    titles = dict.fromkeys(run.data for run, _ in final)
    return {title: [pair for pair in final if pair[0].data == title] for title in titles} | {
        kind.removeprefix("page: "): pairs
        for kind, pairs in found.items()
        if kind.startswith("page: ")
    }


def markdown(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A table."""
    cells = [list(header), ["---"] * len(header), *([str(c) for c in line] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def _pm(value: tuple[float, float] | None, digits: int = 1) -> str:
    return "" if value is None else f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"


def _place(row: dict[str, Any]) -> tuple[float, int]:
    return row["noise"], row["pairs"]


def _cells_of(row: dict[str, Any]) -> list[str]:
    entropy = f"{row['target_entropy']:.2f}" if "target_entropy" in row else ""
    return [*(_pm(row[name]) for name in METRICS), _pm(row.get("teacher mAP")), entropy]


_COLUMNS = [*METRICS, "teacher's mAP", "target entropy"]


def tables(found: dict[str, Found], tuned: dict[tuple[str, int, float], dict[str, Run]]) -> str:
    """All tables as one markdown page."""
    parts = [
        "# Data efficiency: tables\n",
        "Written by `python -m benchmarks.data_efficiency`. Percents of the test half of the evaluation "
        "images, mean ± standard deviation over seeds, which draw pairs, noise, order and heads. mAP is "
        "over the classes of which there are images there.\n",
        "## Settings chosen by mAP on the validation half\n",
        markdown(
            ["data", "pairs", "noise", "loss", "scales' start", "lr", "steps", "weight decay"],
            [
                [
                    *(r.data, r.pairs, f"{r.noise:.0%}", NAMES[r.loss]),
                    *(f"exp({r.scale:g})", f"{r.lr:g}", r.steps, f"{r.decay:g}"),
                ]
                for chosen in tuned.values()
                for r in chosen.values()
            ],
        ),
    ]
    pages = by_title(found)
    if pages:
        parts.append("## OTTER minus each other loss, points, paired by seed\n")
        columns = [(metric, other) for metric in SHOWN for other in ("infonce", "ls", "kd")]
        lines: dict[tuple, list[str]] = {}
        for (title, page), (metric, other) in itertools.product(pages.items(), columns):
            for row in sorted(differences(page, metric, other), key=_place):
                place = title, f"{row['noise']:.0%}", row["pairs"]
                cell = f"{_pm(row['gain'])} ({row['ahead']}/{row['seeds']})"
                lines.setdefault(place, []).append(cell)
        header = [f"{metric}, {NAMES[other]}" for metric, other in columns]
        cells = [[*place, *cells] for place, cells in lines.items()]
        parts.append(markdown(["data", "noise", "pairs", *header], cells))
        parts.append("In brackets: seeds on which OTTER is ahead.\n")
    sections = [(f"{title}: pairs and noise", page, "pairs") for title, page in pages.items()]
    for kind, title, column in (
        ("course", "steps, all else as tuned", "steps"),
        ("image", "the image tower trained as well", "lr"),
    ):
        if kind in found:
            sections.append((f"{found[kind][0][0].data}: {title}", found[kind], column))
    for title, page, column in sections:
        parts.append(f"## {title}\n")
        lines = sorted(
            (r["noise"], r[column], ORDER[r["loss"]], NAMES[r["loss"]], *_cells_of(r))
            for r in rows(page)
        )
        lines = [[f"{noise:.0%}", x, *cells] for noise, x, _, *cells in lines]
        parts.append(markdown(["noise", column, "loss", *_COLUMNS], lines))
    tables: dict[tuple, list[list[Any]]] = {}
    for title, table in ablations(found).items():
        for row in table:
            place = row["data"], row["pairs"], row["noise"]
            cells = [title, row["seeds"], *_cells_of(row), _pm(row.get("mAP gained"))]
            tables.setdefault(place, []).append(cells)
    for (data, pairs, noise), lines in sorted(tables.items()):
        parts.append(
            f"## {data}, {pairs:,} pairs, {noise:.0%} shuffled: settings that are not tuned\n"
        )
        parts.append(markdown(["what", "seeds", *_COLUMNS, "mAP less InfoNCE's"], lines))
    return "\n".join(parts)


def ablations(found: dict[str, Found]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each ablation, beside InfoNCE as tuned on the same pairs."""
    base = found.get("ablation: InfoNCE", [])
    return {
        kind.removeprefix("ablation: "): rows(pairs, base)
        for kind, pairs in found.items()
        if kind.startswith("ablation: ")
    }


def _curves(
    axes: plt.Axes, table: list[dict[str, Any]], x: str, metric: str, style: str, label: str = ""
) -> None:
    for loss, name in NAMES.items():
        points = sorted((row[x], *row[metric]) for row in table if row["loss"] == loss)
        if points:
            at, mean, std = map(np.array, zip(*points, strict=True))
            axes.plot(at, mean, style, color=COLOURS[loss], label=f"{name}{label}", markersize=4)
            axes.fill_between(
                at, mean - std, mean + std, color=COLOURS[loss], alpha=0.12, linewidth=0
            )


def _log_axis(axes: plt.Axes, values: Iterable[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sorted(values))
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))


def _save(figure: plt.Figure, path: Path) -> None:
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=90)
    plt.close(figure)


def draw_final(table: list[dict[str, Any]], path: Path) -> None:
    """mAP and F@1 against pairs, without and with the most noise, and against noise at most pairs."""
    data = list(dict.fromkeys(row["data"] for row in table))
    figure, grid = plt.subplots(
        len(data), 4, figsize=(14, 3.2 * len(data)), layout="constrained", squeeze=False
    )
    for line, name in zip(grid, data, strict=True):
        here = [row for row in table if row["data"] == name]
        most, noisiest = max(r["pairs"] for r in here), max(r["noise"] for r in here)
        for i, metric in enumerate(SHOWN):
            for noise, style in ((0.0, "o-"), (noisiest, "s--")):
                some = [row for row in here if row["noise"] == noise]
                _curves(line[i], some, "pairs", metric, style, f", {noise:.0%} shuffled")
            line[i].set(xlabel="pairs", ylabel=f"{metric} (%)", title=name)
            _log_axis(line[i], {row["pairs"] for row in here})
            some = [{**r, "noise": 100 * r["noise"]} for r in here if r["pairs"] == most]
            _curves(line[2 + i], some, "noise", metric, "o-")
            line[2 + i].set(xlabel="captions shuffled (%)", ylabel=f"{metric} (%)")
            line[2 + i].set_title(f"{name}, {most:,} pairs")
    lines = grid[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=4, fontsize=8)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_steps(table: list[dict[str, Any]], path: Path) -> None:
    """mAP and F@1 against the number of steps."""
    noises = sorted({row["noise"] for row in table})
    figure, grid = plt.subplots(
        1, 2 * len(noises), figsize=(7 * len(noises), 3.4), layout="constrained", squeeze=False
    )
    places = [(noise, metric) for noise in noises for metric in SHOWN]
    for axes, (noise, metric) in zip(grid[0], places, strict=True):
        _curves(axes, [r for r in table if r["noise"] == noise], "steps", metric, "o-")
        axes.set(xlabel="steps", ylabel=f"{metric} (%)")
        _log_axis(axes, {row["steps"] for row in table})
        axes.set_title(f"{table[0]['data']}, {table[0]['pairs']:,} pairs, {noise:.0%} shuffled")
        axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize=7)
    _save(figure, path)


def write(
    folder: Path,
    found: dict[str, Found],
    tuned: dict[tuple[str, int, float], dict[str, Run]],
    checks: dict[str, Any],
    info: dict[str, Any],
) -> None:
    """``data_efficiency.json``, ``.md``, ``.png`` and ``-steps.png`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = by_title(found)
    write_json(
        folder / f"{NAME}.json",
        {
            **info,
            "check": checks,
            "tuned": [run._asdict() for chosen in tuned.values() for run in chosen.values()],
            **{kind: rows(found[kind]) for kind in ("final", "course", "image") if kind in found},
            "tuned elsewhere": {
                title: rows(page) for title, page in pages.items() if ", tuned " in title
            },
            "differences": {
                f"{metric}, {other}": {
                    title: differences(page, metric, other) for title, page in pages.items()
                }
                for metric in METRICS
                for other in ("infonce", "ls", "kd")
            },
            "ablations": ablations(found),
        },
    )
    write_text(folder / f"{NAME}.md", tables(found, tuned))
    if "final" in found:
        draw_final(rows(found["final"]), folder / f"{NAME}.png")
    if "course" in found:
        draw_steps(rows(found["course"]), folder / f"{NAME}-steps.png")
