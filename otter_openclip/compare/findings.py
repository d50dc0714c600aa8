"""What runs came to: a row for each method, differences seed by seed, the verdict, the page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from otter_openclip.compare.trial import FIT, METRICS, Place
from otter_openclip.pages import address, templates, thumbnail

LABELS = {"infonce": "InfoNCE", "ls": "LS", "kd": "KD", "otter": "OTTER", FIT: "closed form"}
LABELS |= {f"{FIT}+{m}": f"{LABELS[m]} from the closed form" for m in LABELS if m != FIT}
_WIDTH, _HEIGHT, _EDGE = 460, 230, 34

Row = Mapping[str, Any]
# By method and seed, as ``trial.run`` gives them.
Results = Mapping[tuple[str, int], Mapping[str, Any]]


def mean_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the sample's standard deviation, 0 of one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(results: Results, chosen_by: str, reported: str) -> list[dict[str, Any]]:
    """A row for each method, that of the highest mean on ``chosen_by`` first.

    Figures are in percent, of ``reported``; differences to InfoNCE, or to the first method if that is
    not compared, seed by seed.
    """
    methods = list(dict.fromkeys(method for method, _ in results))
    base = "infonce" if "infonce" in methods else methods[0]
    seeds = sorted({seed for _, seed in results})
    by_method = {m: {s: results[m, s] for s in seeds if (m, s) in results} for m in methods}
    if FIT in by_method:  # nothing of it is drawn
        by_method[FIT] = dict.fromkeys(seeds, by_method[FIT][0])
    rows = []
    for method, own in by_method.items():

        def percent(test: str, metric: str, own: Any = own) -> dict[int, float]:
            return {seed: 100 * result["metrics"][test][metric] for seed, result in own.items()}

        value = percent(reported, "mAP")
        against = percent(reported, "mAP", by_method[base])
        paired = [value[seed] - against[seed] for seed in value.keys() & against.keys()]
        courses = zip(*(result["course"] for result in own.values()), strict=True)
        row = {
            "method": method,
            "label": LABELS[method],
            "base": LABELS[base],
            "seeds": len(value),
            "choosing": statistics.fmean(percent(chosen_by, "mAP").values()),
            **{m: mean_deviation([*percent(reported, m).values()]) for m in METRICS},
            "course": [(at[0][0], 100 * statistics.fmean(v for _, v in at)) for at in courses],
        }
        if method != base and paired:
            row |= {"difference": mean_deviation(paired), "ahead": sum(x > 0 for x in paired)}
            row["of"] = len(paired)
        rows.append(row)
    return sorted(rows, key=lambda row: -row["choosing"])


def verdict(rows: Sequence[Row]) -> str:
    """One sentence on the best of the rows, and on OTTER."""
    best, compared = rows[0], [row for row in rows if "difference" in row]
    told = [best] if best in compared else compared[:1]
    told += [row for row in compared if row["method"] == "otter" and row not in told]
    parts = [f"Best is {best['label']}, mAP {best['mAP'][0]:.1f}"]
    for row in told:
        mean, deviation = row["difference"]
        name = "" if row is best else f"{row['label']} "
        seeds = f" ± {deviation:.1f}, ahead with {row['ahead']} of {row['of']} seeds"
        parts.append(f"{name}{mean:+.1f} against {row['base']}{seeds if row['of'] > 1 else ''}")
    return f"{'; '.join(parts)}."


def page(
    title: str,
    text: str,
    panels: Mapping[str, Sequence[Row]],
    place: Place,
    results: Results,
    **more: Any,
) -> str:
    """``report.html``: ``panels`` have rows by title, ``results`` what ``place``'s pictures are called.

    ``more`` may be ``importance`` and ``failed`` by method; ``wrong`` pairs (``picture``, ``caption``,
    ``note``) and what is ``said`` of them.
    """
    environment = templates(__file__)
    environment.filters["image"] = lambda picture: address(thumbnail(picture))
    names = {method: result["names"] for (method, _), result in results.items() if result["names"]}
    pictures = [
        (picture, labels, {method: called[n] for method, called in names.items()})
        for n, (picture, labels) in enumerate(place.pictures)
    ]
    charted = [(name, verdict(rows), rows, chart(rows)) for name, rows in panels.items()]
    more = {"importance": {}, "failed": {}, "wrong": [], "said": "", **more}
    shown = {"title": title, "text": text, "panels": charted, "pictures": pictures}
    shown |= {"metrics": list(METRICS), "labels": LABELS}
    return environment.get_template("compare.jinja").render(**shown, **more)


def chart(rows: Sequence[Row]) -> Markup:
    """mAP against steps, an SVG; what has no course, the closed form, is a level line."""
    values = [value for row in rows for _, value in row["course"]]
    low, high = 5 * int(min(values) // 5), 5 * int(max(values) // 5 + 1)
    most = max(row["course"][-1][0] for row in rows)

    def at(steps: float, value: float) -> tuple[float, float]:
        down = _EDGE / 2 + (high - value) / (high - low) * (_HEIGHT - 1.5 * _EDGE)
        return round(_EDGE + steps / most * (_WIDTH - 1.5 * _EDGE), 1), round(down, 1)

    parts = []
    for value in range(low, high + 1, 5):
        x, y = at(0, value)
        parts.append(f'<path class="axis" d="M{x},{y}H{at(most, value)[0]}"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{value}</text>')
    x, y = at(most, low)
    parts.append(f'<text x="{x}" y="{y + 15}" text-anchor="end">{most} steps</text>')
    for row in rows:
        course = row["course"]
        if len(course) == 1:
            course = [(0, course[0][1]), (most, course[0][1])]
        points = "L".join("{},{}".format(*at(*point)) for point in course)
        kind, name = row["method"].replace("+", "-"), escape(row["label"])
        parts.append(f'<path class="course {kind}" d="M{points}"><title>{name}</title></path>')
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="mAP against steps">'
    return Markup(f"{head}{''.join(parts)}</svg>")
