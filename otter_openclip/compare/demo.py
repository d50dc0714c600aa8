"""The demo's run: the smallest comparison, on icons, at settings that are fixed beforehand.

They were fixed before the figures were known, from trials of a prototype, alike for every loss: AdamW at
1e-3, 300 steps of 512 pairs, both scales at exp(2.0) in the beginning; OTTER's own are its defaults, but
that the student is its own teacher.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from otter_openclip.closed_form.fitting_run import FIT_FILE, Towers
from otter_openclip.closed_form.listing import contents
from otter_openclip.compare import figures
from otter_openclip.compare import trial as runs
from otter_openclip.compare.comparison_page import PICTURES, Panel, page
from otter_openclip.compare.demo_towers import find_towers
from otter_openclip.compare.icons import SHUFFLED, find_fonts, write_icons
from otter_openclip.compare.trial import FIT, Place
from otter_openclip.files import write_json, write_text
from otter_openclip.frozen.encode import fill
from otter_openclip.model_folders.towers import make_towers
from otter_openclip.shards import read
from otter_openclip.shards.write import CLASSES_FILE

# Marks a folder as ours. Only the parts are ever deleted, so a stray file of the user's survives.
RESULTS = "demo.json"
PARTS = ("icons", "towers", "features", "report.html", RESULTS)
METHODS = ("infonce", "otter", FIT)
SETTING = {"lr": 1e-3, "steps": 300, "batch-size": 512, "init-logit-scale": 2.0}
OWN = {"infonce": {}, "otter": {"ema-decay": 0.0}}
PAIRS, TEST = 3000, 800
QUICK = {"steps": 10, "batch-size": 32}
QUICK_PAIRS, QUICK_TEST = 192, 120
CONTEXT = 16  # tokens; names have a few words
TITLES = {"right": "Captions as they are", "shuffled": f"{SHUFFLED:.0%} of the captions shuffled"}


def run(output: str | Path, *, quick: bool = False) -> None:
    """Run the whole chain into the folder ``output``: new, empty, or an earlier demo's.

    Raises:
        ValueError: if the folder cannot be used.
        RuntimeError: if towers or icons are not installed, or training fails.
    """
    began, out = time.monotonic(), Path(output)
    towers, fonts = find_towers(), find_fonts()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / RESULTS).is_file():
        raise ValueError(
            f"--output {out} exists and was not written by the demo; choose another folder"
        )
    for part in PARTS:
        path = out / part
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RESULTS, {})
    transformers.logging.disable_default_handler()  # it prints a configuration in every run
    pairs, test = (QUICK_PAIRS, QUICK_TEST) if quick else (PAIRS, TEST)
    print(f"Drawing {pairs:,} icons and {test} of the test", flush=True)
    shards = write_icons(fonts, out / "icons", pairs=pairs, test=test)
    with runs.quietly():
        make_towers(out / "towers", image_size=112, context_length=CONTEXT, **towers)
    _encode(out, shards)
    places = {name: _place(out, name) for name in TITLES}
    setting = SETTING | (QUICK if quick else {})
    panels, results = [], {}
    with tqdm(total=len(places) * len(METHODS), unit="run") as bar:
        for name, place in places.items():
            results[name] = {}
            for method in METHODS:
                bar.set_description(f"{TITLES[name]}, {runs.label(method)}")
                own = runs.closed_form() if method == FIT else setting | OWN[method]
                outcome = runs.run(method, own, place, 0, name_pictures=True)
                results[name][method, 0] = outcome._asdict()
                bar.update()
            rows = figures.table(results[name], "icons", "icons")
            panels.append(Panel(TITLES[name], rows, figures.verdict(rows)))
    shown = _shown(places["shuffled"])
    names = {method: result["names"] for (method, _), result in results["shuffled"].items()}
    classes = (out / "icons" / "test-icons" / CLASSES_FILE).read_text().splitlines()
    text = (
        f"Linear heads on two frozen pretrained towers learn {pairs:,} icons and the words of their "
        f"names, {setting['steps']} steps of {setting['batch-size']}, and name icons held out by "
        f"{len(classes)} words. One seed: a demonstration, not a benchmark."
    )
    record = {"failed": {}, "importance": {}}
    wrong, said = _wrong(places["shuffled"])
    html = page("OTTER on icons", text, panels, shown, names, record, classes, wrong)
    write_text(out / "report.html", html)
    seconds = round(time.monotonic() - began, 1)
    listed = {name: panel.rows for name, panel in zip(places, panels, strict=True)}
    write_json(out / RESULTS, {"seconds": seconds, "setting": setting, **listed, "wrong": said})
    _print(panels)
    print(f"\n{said}\n{seconds / 60:.1f} minutes. Open {out / 'report.html'}")


def _place(out: Path, name: str) -> Place:
    shards = str(out / "icons" / name / "{00000..00002}.tar")
    tests = {"icons": out / "icons" / "test-icons"}
    place = Place(f"local-dir:{out / 'towers'}", shards, tests, out)
    place.pictures = [picture for picture, _ in _shown(place)]
    return place


def _shown(place: Place) -> list[Any]:
    return runs.labelled(place.tests["icons"], PICTURES)


def _encode(out: Path, shards: dict[str, list[Path]]) -> None:
    """What the towers give for the pairs; pictures are the same with right and shuffled captions."""
    towers = Towers(str(out / "towers"), out / "features", "fp32", torch.device("cpu"))
    right, shuffled = ([str(path) for path in paths] for paths in shards.values())
    fill([towers.images, towers.texts], right, device=torch.device("cpu"), workers=1)
    for one, other in zip(right, shuffled, strict=True):
        towers.images.files.write(other, towers.images.files.read(one))


def _wrong(place: Place) -> tuple[list[dict[str, Any]], str]:
    """The pairs that the fit finds most certainly wrong, and how many of all are."""
    fits = [json.loads(path.read_text()) for path in place.work.glob(f"features/fit-*/{FIT_FILE}")]
    fit = next(fit for fit in fits if fit["train_data"] == place.train_data)
    wrong, folder = fit["wrong"], Path(place.train_data).parent
    right = sum(pair["key"].endswith("w") for pair in wrong)
    shuffled = sum(
        key.endswith("w") for path in folder.glob("*.tar") for key, _ in read.samples(path)
    )
    said = (
        f"The closed form finds {len(wrong)} pairs wrong; of these {right} are, of {shuffled} in all. "
        f"It estimates {fit['wrong_share']:.0%}."
    )
    return list(_pictures(wrong[:PICTURES])), said


def _pictures(wrong: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    places = {}
    for pair in wrong:
        keys = [key for key, _ in read.samples(pair["shard"], contents=False)]
        places[pair["shard"], keys.index(pair["key"])] = pair
    samples = contents(list(places))
    for at, pair in places.items():
        truly = "its caption was shuffled" if pair["key"].endswith("w") else "its own name"
        yield {
            "picture": read.opened(samples[at]["png"]),
            "caption": samples[at]["txt"].decode(),
            "note": f"right with {pair['weight']:.0%}; {truly}",
        }


def _print(panels: list[Panel]) -> None:
    for panel in panels:
        print(f"\n{panel.title}\n{'':<12} {'mAP':>6} {'F@1':>6} {'F@5':>6}")
        for row in panel.rows:
            values = " ".join(f"{row[name][0]:>6.1f}" for name in runs.METRICS)
            print(f"{row['label']:<12} {values}")
