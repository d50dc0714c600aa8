"""The commands of the README and of docs/, and how their programs' own parsers take them."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import clip_benchmark.cli
import pytest
import torch.distributed.run
import training_helpers

from otter_openclip import cli
from otter_openclip.cli import Command
from otter_openclip.evaluation import evaluator
from otter_openclip.training import flags

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "patches" / "README.md"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
SHELLS = ("sh", "bash", "console")
# Not ours, and not installed for tests: only that they are spelt like a command line is known.
FOREIGN = ("cd", "export", "git", "img2dataset", "sed", "tensorboard")
OURS_IN_STOCK = ("goi", "imagenet10k", "zeroshot_multilabel")  # of a patched clip_benchmark


def blocks(page: Path, *languages: str) -> list[str]:
    """Contents of the page's fences of these languages."""
    return [body for language, body in FENCE.findall(page.read_text()) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The words of every command of the page; a last ``...`` stands for flags of the reader's."""
    return [words for block in blocks(page, *SHELLS) for words in _commands(block)]


def _commands(block: str) -> Iterator[list[str]]:
    for line in re.sub(r"\\\n", " ", block).splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Parse a command as its program does, without running it; returns what took it.

    Raises:
        SystemExit: with another code than 0, as the program, for flags that it does not take.
        AssertionError: for a program, file, target or extra that does not exist.
    """
    words = [word for word in words if word != "..."]
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, rest = words[0], words[1:]
    if program in FOREIGN:
        return program
    if program == "srun":
        return parse(rest, monkeypatch)
    if program == "sbatch":
        assert (ROOT / rest[0]).is_file(), rest[0]
        return parse(["otter-openclip", "train", "--config", *rest[1:]], monkeypatch)
    if program == "torchrun":
        args = torch.distributed.run.get_args_parser().parse_args(rest)
        assert args.module
        module = ["python", "-m", args.training_script, *args.training_script_args]
        return parse(module, monkeypatch)
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M), rest
        return program
    if program == "pip":
        _check_install(rest)
        return program
    if program == "python":
        assert rest[0] == "-m", rest
        return _module(rest[1], rest[2:], monkeypatch)
    if program == "clip_benchmark":
        return _clip_benchmark(rest, monkeypatch)
    assert program == "otter-openclip", program
    return _ours(rest, monkeypatch)


def _module(name: str, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    if name in (
        "otter_openclip.train",
        "open_clip_train.main",
    ):  # the latter patched: the same flags
        return _ours(["train", *rest], monkeypatch)
    if name == "otter_openclip.cli":
        return _ours(rest, monkeypatch)
    if name == "clip_benchmark.cli":
        return _clip_benchmark(rest, monkeypatch)
    if name == "pytest":
        files = [word for word in rest if word not in ("-m", "slow")]
        assert all((ROOT / word).is_file() for word in files), rest
        return name
    assert name.startswith("benchmarks."), name
    _until_parsed(importlib.import_module(name).main, ["benchmark", *rest], monkeypatch)
    return name


class _Parsed(Exception):
    pass


def _until_parsed(main, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``main`` up to where its command line is parsed."""
    stock = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        raise _Parsed

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(_Parsed):
            main()


def _clip_benchmark(rest: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    if set(rest) & set(
        OURS_IN_STOCK
    ):  # its patched parser has the flags of ours, and one more task
        return _ours([w.replace("_multilabel", "_classification") for w in rest], monkeypatch)
    _exit_0(clip_benchmark.cli.get_parser_args, ["clip_benchmark", *rest], monkeypatch)
    return "clip_benchmark"


def _exit_0(parse, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        try:
            parse()
        except SystemExit as stop:  # --help
            if stop.code:
                raise


def _ours(rest: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as patch:
        if rest[0] == "train":
            patch.setattr(flags, "check_folders", lambda folder: None)  # of --zeroshot-data
            training_helpers.parse_args(*rest[1:])
        elif rest[0] == "eval":
            _exit_0(evaluator._get_parser_args, ["otter-openclip", *rest], patch)
        else:
            _without_work(cli.COMMANDS, rest[0], patch)
            assert cli.main(rest) == 0
    return f"otter-openclip {rest[0]}"


def _without_work(commands: Mapping[str, Command], name: str, patch: pytest.MonkeyPatch) -> None:
    """Let a command parse its line, and do nothing."""
    assert name in commands, name
    module = importlib.import_module(commands[name].module)
    if hasattr(module, "COMMANDS"):
        for inner in module.COMMANDS:
            _without_work(module.COMMANDS, inner, patch)
    else:
        patch.setattr(module, "main", lambda args: 0)


def _check_install(rest: list[str]) -> None:
    assert rest[0] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in rest[1:]:
        name, _, extras = word.rstrip("]").partition("[")
        assert name in (".", project["name"]), word
        assert set(filter(None, extras.split(","))) <= set(project["optional-dependencies"]), word
