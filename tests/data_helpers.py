"""Small files in the formats of the official data sets, and plain readers of what is built."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image

from otter_openclip import cli


def as_file(image: Image.Image, format_name: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def jpeg(seed: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> bytes:
    """JPEG content that differs from seed to seed."""
    rng = random.Random(seed)
    image = Image.new("RGB", (6, 5))
    image.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(30)])
    return as_file(image.resize(size, Image.Resampling.NEAREST).convert(mode), "JPEG")


def encoded(seed: int, format_name: str, mode: str = "RGB", **options) -> bytes:
    """The picture of ``jpeg(seed)`` in another format or mode."""
    return as_file(Image.open(io.BytesIO(jpeg(seed))).convert(mode), format_name, **options)


def member(tar: tarfile.TarFile, name: str, content: bytes = b"", **changes: object) -> None:
    """Add a file to a tar; ``changes`` are of its header."""
    info = tarfile.TarInfo(name)
    for key, value in {"size": len(content), **changes}.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member(tar, name, content)
    return path


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def change_json(path: Path, **changes: object) -> None:
    """Put values into a JSON file, which is made if it is not there."""
    contents = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(contents | changes), encoding="utf-8")


def pack(kind: str, folder: Path, files: dict[str, bytes]) -> Path:
    """The same files as a folder, an archive, or archives in a folder or in another."""
    if kind == "folder":
        return write_files(folder / "source", files)
    if kind in ("folder of tars", "tar of tars"):
        parts = [dict([item]) for item in files.items()] + [{}]
        tars = [write_tar(folder / "tars" / f"{n}.tar", part) for n, part in enumerate(parts)]
        if kind == "tar of tars":
            return write_tar(folder / "outer.tar", {tar.name: tar.read_bytes() for tar in tars})
        (folder / "tars" / "no_bytes.tar").touch()
        return folder / "tars"
    path = folder / f"source.{kind}"
    if kind.lower() != "zip":
        mode = "w" if kind.lower() == "tar" else "w:gz"
        return write_tar(path, {f"./{n}": c for n, c in files.items()}, mode)
    with zipfile.ZipFile(path, "w") as archive:
        for number, (name, content) in enumerate(files.items()):
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if number % 2 else None)
    return path


def run(*words: str | Path) -> int:
    """Run ``otter-openclip data ...`` in this process, on one worker unless told otherwise."""
    line = ["data", *map(str, words)]
    return cli.main(line if "--workers" in line else [*line, "--workers", "1"])


def refused(capsys, status: int, message: str) -> None:
    """A command that ended with ``status`` has refused its input with ``message``."""
    assert status == 2
    assert message in capsys.readouterr().err


def samples(*shards: Path) -> dict[str, dict[str, bytes]]:
    """key -> suffix -> content of all shards, with plain tarfile; no key may occur twice."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in shards:
        own: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard, "r:") as tar:
            for member in tar.getmembers():
                key, suffix = member.name.split(".")
                assert suffix not in own.setdefault(key, {})
                own[key][suffix] = tar.extractfile(member).read()
        assert found.keys().isdisjoint(own), "a key in two shards"
        found |= own
    return found


def tree(folder: Path) -> dict[str, str]:
    """Path -> hash of every file but the builder's hidden state."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".otter-build" not in path.parts
    }


def dropped(output: Path) -> list[tuple[str, str]]:
    """(sample, reason) of every row of the build's report, sorted."""
    header, *rows = (output / "dropped.tsv").read_text(encoding="utf-8").splitlines()
    assert header == "sample\treason\tdetail"
    return sorted(tuple(row.split("\t")[:2]) for row in rows)


def skipped(output: Path) -> dict[str, int]:
    return json.loads((output / "report.json").read_text(encoding="utf-8"))["skipped"]
