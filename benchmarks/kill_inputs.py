"""Small inputs of every builder in the official formats, with missing and broken images among them."""

from __future__ import annotations

import bz2
import functools
import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

# Rows beside the images', so that planning takes a part of the build that a kill can hit.
OTHERS = 20_000
_CLASSES = [f"class {n}" for n in range(50)]


def make(folder: Path, images: int, cases: Iterable[str]) -> dict[str, list[str]]:
    """Write the inputs of ``cases``; the commands without --output and --workers, by case."""
    contents = {
        n: content
        for n in tqdm(range(images), "Drawing pictures", leave=False)
        if (content := _content(n)) is not None
    }
    common = ["--resize", "200", "--shard-size", str(max(1, images // 12))]
    commands = {}
    for case in tqdm(cases, "Writing inputs", leave=False):
        (folder / case).mkdir(parents=True)
        words = [str(word) for word in CASES[case](folder / case, contents, images)]
        commands[case] = [*words, *common]
    return commands


def _content(number: int) -> bytes | None:
    """A picture; every 13th is missing and every 17th cut short."""
    if number % 13 == 5:
        return None
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (10, 14, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()[: -2000 if number % 17 == 7 else None]


def _write_text(path: Path, rows: Iterable[Iterable[object]], separator: str = "\t") -> Path:
    text = "".join(separator.join(map(str, row)) + "\n" for row in rows)
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def _write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _thirds(files: Mapping[str, bytes]) -> list[dict[str, bytes]]:
    names = [*files]
    return [{name: files[name] for name in names[n::3]} for n in range(3)]


def _url(number: int) -> str:
    return f"http://example.com/{number}.jpg"


def _cc3m_table(folder: Path, images: int) -> Path:
    rows = [(f"a picture of {n}", _url(n)) for n in range(images + OTHERS)]
    return _write_text(folder / "Train_GCC-training.tsv", rows)


def _cc3m_report(folder: Path, contents: Mapping[int, bytes], images: int) -> list:
    files = {f"training/{n}_{n * 7}": content for n, content in contents.items()}
    rows = [(f"training/{n}_{n * 7}", "training", "image/jpeg", 9, 200, _url(n)) for n in contents]
    rows += [("", "training", "", "", 404, _url(images + n)) for n in range(OTHERS)]
    report = _write_text(folder / "downloaded_training_report.tsv", rows)
    source = ["--report", report, "--images", _write_folder(folder / "images", files)]
    return ["cc3m", "--captions", _cc3m_table(folder, images), *source]


def _cc3m_img2dataset(folder: Path, contents: Mapping[int, bytes], images: int) -> list:
    names = [*contents]
    for shard in range(6):
        files = {}
        for n in names[shard::6]:
            key = f"{shard:05d}{n:04d}"
            about = {"caption": "theirs", "url": _url(n), "key": key, "status": "success"}
            files |= {f"{key}.jpg": contents[n], f"{key}.json": json.dumps(about).encode()}
            files[f"{key}.txt"] = b"theirs"
        _write_tar(folder / "images" / f"{shard:05d}.tar", files)
    table = _cc3m_table(folder, images)
    return ["cc3m", "--captions", table, "--img2dataset", folder / "images"]


def _csv(folder: Path, contents: Mapping[int, bytes], images: int, kind: str) -> list:
    rows = [(f"part{n % 3}/{n}.jpg", f"a picture of {n}") for n in range(images + OTHERS // 5)]
    table = _write_text(folder / "table.tsv", [("filepath", "title"), *rows])
    parts = _thirds({rows[n][0]: content for n, content in contents.items()})
    if kind == "folder":
        for part in parts:
            _write_folder(folder / "images", part)
        sources = [folder / "images"]
    else:
        write = {"tar": _write_tar, "zip": _write_zip}[kind]
        sources = [write(folder / f"{n}.{kind}", part) for n, part in enumerate(parts)]
    return ["csv", "--captions", table, "--images", *sources]


def _wit(folder: Path, contents: Mapping[int, bytes], images: int) -> list:
    columns = (
        "language page_url image_url page_title section_title hierarchical_section_title "
        "caption_reference_description caption_attribution_description "
        "caption_alt_text_description mime_type original_height original_width is_main_image "
        "attribution_passes_lang_id page_changed_recently context_page_description "
        "context_section_description"
    ).split()

    def row(language: str, number: int) -> list[str]:
        values = dict.fromkeys(columns, "")
        url = f"https://upload.wikimedia.org/wikipedia/commons/a/a0/{number}.jpg"
        values |= {"language": language, "image_url": url, "page_title": "Title"}
        return [*(values | {"caption_reference_description": f"a picture of {number}"}).values()]

    half = images // 2
    tables = []
    for number, part in enumerate((range(half), range(half, images))):
        rows = [columns, *(row("en", n) for n in part)]
        rows += [row("de", n) for n in range(OTHERS // 2)]
        name = f"wit_v1.train.all-0000{number}-of-00002.tsv.gz"
        tables.append(_write_text(folder / name, rows))
    files = {f"{n}.jpg": content for n, content in contents.items()}
    return ["wit", "--tables", *tables, "--images", _write_folder(folder / "images", files)]


def _yfcc15m(folder: Path, contents: Mapping[int, bytes], images: int) -> list:
    def code(photo: int) -> str:
        return hashlib.md5(str(photo).encode()).hexdigest()

    def row(photo: int) -> list[object]:
        values = [photo, "1@N00", "nick", "", "", "", f"Title+{photo}", "A+%3Cb%3Ephoto%3C%2Fb%3E"]
        values += ["tag", "", "", "", "", "http://page", f"http://farm4/1/{photo}_s.jpg"]
        return [*values, "lic", "http://lic", 1, 4, "secret", "orig", "jpg", 0]

    subset = [(n, 1000 + n, code(1000 + n)) for n in range(images)]
    metadata = [row(1000 + n) for n in range(images)] + [row(10**6 + n) for n in range(OTHERS)]
    files = {}
    for n, content in contents.items():
        name = code(1000 + n)
        files[f"data/images/{name[:3]}/{name[3:6]}/{name}.jpg"] = content
    for number, part in enumerate(_thirds(files)):
        _write_zip(folder / "images" / f"{number}.zip", part)
    return [
        *("yfcc15m", "--subset", _write_text(folder / "yfcc100m_subset_data.tsv", subset)),
        *("--metadata", _write_text(folder / "yfcc100m_dataset.bz2", metadata)),
        *("--images", folder / "images"),
    ]


def _open_images(folder: Path, contents: Mapping[int, bytes], images: int) -> list:
    classes = [("LabelName", "DisplayName")]
    classes += [(f"/m/0{n:03d}", name) for n, name in enumerate(_CLASSES)]
    labels: list[tuple] = [("ImageID", "Source", "LabelName", "Confidence")]
    for n in range(images):
        labels += [(f"{n:016x}", "verification", f"/m/0{(n + k) % 50:03d}", k) for k in (0, 1)]
    labels += [
        (f"{images + n:016x}", "verification", "/m/0000", 0) for n in range(OTHERS)
    ]  # images without a positive label
    files = {f"{n:016x}.jpg": content for n, content in contents.items()}
    return [
        *("open-images", "--classes", _write_text(folder / "classes.csv", classes, ",")),
        *("--labels", _write_text(folder / "labels.csv", labels, ",")),
        *("--images", _write_folder(folder / "images", files), "--max-missing", "50%"),
    ]


def _imagenet10k(folder: Path, contents: Mapping[int, bytes], images: int) -> list:
    classes = [("category_index", "category_id", "parent_index", "category_name")]
    classes += [(n, f"n{n:08d}", -1, name) for n, name in enumerate(_CLASSES)]
    names = [f"n{n % 50:08d}/n{n % 50:08d}_{n}.JPEG" for n in range(images + OTHERS)]
    labels = [(name, f"{n % 50}:{int(n < images)}") for n, name in enumerate(names)]
    files = {names[n]: content for n, content in contents.items()}
    return [
        *("imagenet10k", "--classes", _write_text(folder / "dictionary.txt", classes)),
        *("--labels", _write_text(folder / "val.txt", labels)),
        *("--images", _write_tar(folder / "images.tar.gz", files), "--max-missing", "50%"),
    ]


def _hf(folder: Path, contents: Mapping[int, bytes], images: int) -> list:
    import pyarrow
    from pyarrow import parquet

    for part in range(3):
        rows = [
            {"image": {"bytes": contents.get(n), "path": f"{n}.jpg"}, "text": f"picture {n}"}
            for n in range(part, images, 3)
        ]
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, folder / f"train-0000{part}-of-00003.parquet")
    return ["hf", "--dataset", folder]


CASES: dict[str, Callable[[Path, Mapping[int, bytes], int], list]] = {
    "cc3m-report": _cc3m_report,
    "cc3m-img2dataset": _cc3m_img2dataset,
    "csv-folder": functools.partial(_csv, kind="folder"),
    "csv-tar": functools.partial(_csv, kind="tar"),
    "csv-zip": functools.partial(_csv, kind="zip"),
    "wit": _wit,
    "yfcc15m": _yfcc15m,
    "open-images": _open_images,
    "imagenet10k": _imagenet10k,
    "hf": _hf,
}
