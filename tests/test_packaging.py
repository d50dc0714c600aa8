"""What is installed: the wheel in a fresh environment, and what the package says of itself."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from patched import ROOT, copy_packages, tomllib

import otter_openclip

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILT_FROM = ("otter_openclip", "configs", "patches", "pyproject.toml", "MANIFEST.in")
BUILT_FROM += ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that knows nothing of this checkout."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist, and the wheel that is made from it, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("build")
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    backend = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])('{}')"
    code = backend.format(folder / "dist")
    run(sys.executable, "-c", code, "build_sdist", cwd=folder)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run(sys.executable, "-c", code, "build_wheel", cwd=unpacked)
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """The folder of commands of a new environment that has the wheel, and this one's dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    commands = folder / "bin"
    words = ["--python", commands / "python", "install", "--no-deps", "--no-index", "--quiet"]
    run(sys.executable, "-m", "pip", *words, distributions[1], cwd=folder)
    (site,) = (folder / "lib").glob("python*/site-packages")
    here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "dependencies.pth").write_text("\n".join(here) + "\n", encoding="utf-8")
    return commands


def test_both_distributions_have_what_is_used(distributions):
    sdist, wheel = distributions
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (record,) = (name for name in names if name.endswith("/METADATA"))
        stated = archive.read(record).decode()
    assert f"\nVersion: {otter_openclip.__version__}\n" in stated
    assert "otter_openclip/py.typed" in names
    for folder, pattern in (("configs", "*.yaml"), ("patches", "*"), ("otter_openclip", "**/*.*")):
        for path in {*(ROOT / folder).glob(pattern)} - {*(ROOT / folder).rglob("*.pyc")}:
            name = str(path.relative_to(ROOT))
            assert name in source
            assert (name if folder == "otter_openclip" else f"otter_openclip/{name}") in names
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"} <= source
    assert PROJECT["name"] in PROJECT["scripts"]  # what uvx and pipx run look for
    assert not [name for name in source | names if name.split("/")[0] in ("tests", "benchmarks")]


CHAIN = """
import json, sys
from pathlib import Path
import clip_benchmark.cli
import otter_openclip
from otter_openclip import cli
from otter_openclip.compare import icons

assert otter_openclip.__file__.startswith(sys.prefix), otter_openclip.__file__

def run(line):
    assert cli.main(line.split()) == 0, line

icons.write_icons(icons.find_fonts(), Path("icons"), pairs=60, test=800)
run("train --config cc3m_rn50_declutr_otter --model otter-tiny-trial --no-pretrained-image"
    " --no-use-bn-sync --train-data icons/right/00000.tar --train-num-samples 16 --batch-size 16"
    " --epochs 1 --workers 1 --name trial")
run("export logs/trial out")
run("eval --model local-dir:out --pretrained= --dataset wds/mine --no_amp --num_workers 0"
    " --dataset_root icons/test-icons --output result.json")
sys.argv = "clip_benchmark build result.json --output results.csv".split()
clip_benchmark.cli.main()
"""


def test_train_export_and_eval_from_the_wheel_in_an_empty_folder(installed, tmp_path):
    run(installed / "python", "-c", CHAIN, cwd=tmp_path)
    metrics = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["metrics"]
    table = (tmp_path / "results.csv").read_text(encoding="utf-8")  # clip_benchmark's
    (row,) = csv.DictReader(table.splitlines())
    assert (row["dataset"], row["model"]) == ("wds/mine", "local-dir:out")
    assert all(float(row[name]) == value for name, value in metrics.items())


def test_the_command_patches_from_the_wheel(installed, tmp_path):
    copy_packages("clip_benchmark", tmp_path / "site")
    words = [installed / "otter-openclip", "patch", "clip_benchmark", "--target", "site"]
    assert "not patched" in run(*words, cwd=tmp_path)
    run(*words, "--apply", cwd=tmp_path)
    assert ": patched" in run(*words, cwd=tmp_path)


IMPORT = re.compile(r"^ *import (\w+)|^ *from (\w+)[\w.]* import ", re.M)


def imported() -> set[str]:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "otter_openclip").rglob("*.py")]
    names = {match[1] or match[2] for match in IMPORT.finditer("\n".join(texts))}
    names -= {"otter_openclip", *sys.stdlib_module_names}
    installed = metadata.packages_distributions()
    # What is not installed here (wandb, of an extra) has the name of its module.
    return {normal(installed.get(name, [name])[0]) for name in names}


def normal(requirement: str) -> str:
    """The name in a requirement, as package indexes spell it."""
    return re.split(r"[\[<>=!;~ ]", requirement)[0].lower().replace("_", "-").replace(".", "-")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 cannot say what is of whom")
def test_what_is_imported_is_declared_and_the_other_way_round():
    declared = {normal(line) for line in PROJECT["dependencies"]}
    optional = [lines for name, lines in PROJECT["optional-dependencies"].items() if name != "dev"]
    extras = {normal(line) for lines in optional for line in lines}
    assert imported() - declared - extras == set()
    assert declared & extras == set()
    assert declared - imported() == {"requests"}  # clip-benchmark's


def test_the_citation_is_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == otter_openclip.__version__
    paper = citation["preferred-citation"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    authors = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    assert f"{{{authors}}}" in readme and f"{{{paper['title']}}}" in readme
    assert f"## {otter_openclip.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda p: p.stem)
def test_example_notebooks_run(path, capsys):
    """Cell by cell in this process: a kernel of its own would import torch once more."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cell for cell in cells if cell["cell_type"] == "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), names)
    assert capsys.readouterr().out
