"""The documentation: it builds, its commands parse, and what it names is there.

Every command of every page is parsed by its own program. Those of ``start.md`` and ``recipes.md`` are
run too, one after the other as they stand, on tiny models and data (QUICK).
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import logging
import re
import shutil

import clip_benchmark.cli
import mkdocs.commands.build
import mkdocs.config
import open_clip
import pytest
import timm
import torch
from documented import FENCE, FLAG, PAGES, ROOT, blocks, commands_of, parse
from open_clip_train import data, params

from otter_openclip import cli
from otter_openclip.losses import DistillationLoss
from otter_openclip.replacing import replaced
from otter_openclip.training import launcher, plugin

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@by_page
def test_every_command_parses(page, monkeypatch, capsys):
    for words in commands_of("".join(blocks(page, "sh", "bash"))):
        try:
            parse(words, monkeypatch)
        except (SystemExit, AssertionError, FileNotFoundError) as error:
            pytest.fail(f"{' '.join(words)}: {error!r} {capsys.readouterr().err}")


def test_a_mistyped_command_does_not(monkeypatch):
    for line in (
        "torchrun --nproc_per_node 8 -m -- otter_openclip.train --loss otter --sinkhorn-lamda 0.1",
        "otter-openclip eval --kss 5",
        "otter-openclip data csv --captoins pairs.tsv --output out",
        "otter-openclip exprt a b",
        "python -m benchmarks.loss --devise cuda",
        "pip install 'otter-openclip[demos]'",
        "make doc",
        "otter-openclp demo",
    ):
        (words,) = commands_of(line)
        with pytest.raises((SystemExit, AssertionError)):
            parse(words, monkeypatch)


def test_the_changed_flag_of_the_readme_parses(monkeypatch):
    (diff,) = blocks(ROOT / "README.md", "diff")
    after = "\n".join(line[1:] for line in diff.splitlines() if line[0] in "+ ")
    (words,) = commands_of(after)
    parse(words, monkeypatch)


# What a walk has instead of a page's values.
QUICK = "--model tiny-vit --batch-size 12 --accum-freq 1 --epochs 1 --warmup 1 --workers 0"
QUICK += " --precision fp32 --pretrained tiny-vit.pt --image test_resnet --image-weights image.pt"
QUICK = dict(re.findall(r"(\S+) (\S+)", f"{QUICK} --text text --context-length 8"))
EVALUATION = ("--num_workers", "0", "--batch_size", "8", "--no_amp", "--ks", "1")


def quick(words: list[str]) -> list[str]:
    shorter = [
        QUICK[flag] if flag in QUICK and ":" not in word and word else word
        for flag, word in zip(["", *words], words, strict=False)
        if word != "cifar100"
    ]
    return [*shorter, *EVALUATION] if words[1] == "eval" else shorter


@pytest.fixture(scope="module")
def place(tmp_path_factory, pairs, labelled, hf_model):
    """A folder with what the pages take for granted: a table, test sets, and weights."""
    folder = tmp_path_factory.mktemp("walk")
    shutil.copy(pairs / "pairs.csv", folder / "pairs.tsv")
    (folder / "eval").mkdir()
    for name in ("mine", "domain"):
        (folder / "eval" / name).symlink_to(labelled)
    torch.save(open_clip.create_model("tiny-vit").state_dict(), folder / "tiny-vit.pt")
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "image.pt")
    (folder / "text").symlink_to(open_clip.get_model_config(hf_model)["text_cfg"]["hf_model_name"])
    return folder


@pytest.mark.parametrize("page", ["start", "recipes"])
def test_pages_can_be_followed(page, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    root = logging.getLogger()
    for folder in ("logs", "shards"):
        shutil.rmtree(folder, ignore_errors=True)
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for language, block in FENCE.findall(text):
        if language == "python":
            code = block.replace("ViT-B-32", "tiny-vit")
            exec(compile(code.replace("laion2b_s34b_b79k", "tiny-vit.pt"), page, "exec"), {})
            continue
        for words in commands_of(block):
            with replaced((root, "handlers", list(root.handlers))):  # open_clip adds to them
                assert cli.main(quick(words)[1:]) == 0, (words, capfd.readouterr().err[-2000:])


@by_page
def test_python_of_the_pages_runs(page):
    for code in blocks(page, "python"):
        compiled = compile(code, page.name, "exec")
        if "local-dir:" not in code and "pretrained=" not in code:  # which need files
            exec(compiled, {})


# Of other programs.
OTHERS = """--logs-specs --output_format --url_col --resize_mode --resize_only_if_bigger --3way --exclude
--from --spec --unshallow --no-SWITCH --global_ot --image-head --text-head""".split()


@pytest.fixture(scope="module")
def known_flags():
    """As the sources of the parsers name them; those of commands are parsed in earlier tests."""
    sources = [*ROOT.glob("otter_openclip/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    text += inspect.getsource(params) + inspect.getsource(clip_benchmark.cli)
    return {*FLAG.findall(text.replace("'", '"')), *OTHERS}


@by_page
def test_flags_in_the_text_exist(page, known_flags):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    if page.name == "method.md":  # its first column is the reference's
        text = re.sub(r"^\|.*?[^\\]\|", "", text, flags=re.M)
    spans = re.findall(r"`([^`]+)`", text)
    used = {flag for span in spans for flag in re.findall(r"(?<!\S)--[\w-]+(?=$|[ =,])", span)}
    assert used - known_flags == set()


def test_messages_of_troubleshooting_are_the_codes():
    """Each line quoted there has a fixed part of a message of the package, or of open_clip's loader."""
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("otter_openclip/**/*.py")]
    strings = [
        node.value
        for source in [*sources, inspect.getsource(data)]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 20
    ]
    for block in blocks(ROOT / "docs" / "troubleshooting.md", "output"):
        for line in block.splitlines():
            assert any(string in line for string in strings), line


def test_the_table_of_the_seam_names_what_there_is():
    text = (ROOT / "docs" / "seam.md").read_text(encoding="utf-8")
    rows = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", text, re.M)[2:]]
    hooks = {hook for row in rows for hook in re.findall(r"`(\w+)`", row[0])}
    names = {name for row in rows for name in re.findall(r"`([\w.]+)`", row[2])}
    made = launcher.Run(plugin.Plugin()).replacements()
    assert {f"{module.__name__.rpartition('.')[2]}.{name}" for module, name, _ in made} == names
    assert len(hooks) == 10 and hooks - {"parse_args"} <= set(dir(plugin.ClipPlugin))


def test_costs_are_those_of_the_results():
    page = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")
    files = [ROOT / "benchmarks" / "results" / f"{name}.json" for name in ("loss", "step")]
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    rows, steps = contents[0]["loss"], contents[1]["step"]
    for count in {row["N"] for row in rows}:
        (line,) = re.findall(rf"^\| {count:,} \|.*$", page, re.M)
        written = [float(cell.split()[0]) for cell in line.split("|")[2:7]]
        order = ("dense", "streaming", "plain", "clip", "distill")
        measured = [r["seconds"] for o in order for r in rows if r["N"] == count and r["loss"] == o]
        assert written == pytest.approx(measured, rel=0.06, abs=1e-3)
    for row in steps:
        if row["what"] == "step, --loss otter":
            assert f"{row['model']} {row['of clip']:.2f}" in page


def test_pages_are_short():
    long = {page.name for page in PAGES if len(page.read_text(encoding="utf-8").splitlines()) > 170}
    assert long == {"evidence.md"}


def test_a_name_of_the_code_is_found_or_refused():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    spec.loader.exec_module(hooks := importlib.util.module_from_spec(spec))
    (_, line) = inspect.getsourcelines(DistillationLoss._target)
    assert hooks.line_of("losses.py", "DistillationLoss._target") == line
    with pytest.raises(LookupError, match="has no otter_targets"):
        hooks.line_of("losses.py", "otter_targets")


def test_the_site_builds_strictly_and_loads_nothing(tmp_path):
    config = mkdocs.config.load_config("mkdocs.yml", site_dir=str(tmp_path / "site"), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    mkdocs.commands.build.build(config)  # raises for a warning
    loads = re.compile(r"<(?:script|link|img|iframe)\b[^>]*=\"?https?:")
    for page in (tmp_path / "site").rglob("*.html"):
        assert not loads.search(page.read_text(encoding="utf-8"))
    method = (tmp_path / "site" / "method.html").read_text(encoding="utf-8")
    assert method.count("<math ") == len(blocks(ROOT / "docs" / "method.md", "math")) > 8
    assert "source/losses.html#__codelineno-0-" in method
