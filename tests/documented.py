"""The commands of the README and of docs/, and how their programs' own parsers take them."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import clip_benchmark.cli
import pytest
import torch.distributed.run
import training_helpers

from otter_openclip import cli
from otter_openclip.evaluation import evaluator
from otter_openclip.training import flags

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "patches" / "README.md"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
FLAG = re.compile(r'"(--[\w-]+)"')  # as sources name them
OURS = {"otter-openclip": [], "-m otter_openclip.cli": [], "-m otter_openclip.train": ["train"]}
OURS["-m open_clip_train.main"] = ["train"]  # patched, it has the same flags
# Not ours, and not installed for tests: only that they are spelt like a command line is known.
FOREIGN = ("cd", "export", "git", "img2dataset", "sed", "tensorboard")
OURS_IN_STOCK = {"goi", "imagenet10k", "zeroshot_multilabel"}  # of a patched clip_benchmark


def blocks(page: Path, *languages: str) -> list[str]:
    """Contents of the page's fences of these languages."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [body for language, body in found if language in languages]


def commands_of(block: str) -> Iterator[list[str]]:
    """The words of every command of a fence; a last ``...`` stands for flags of the reader's."""
    for line in re.split("\n|&&", block.replace("\\\n", " ")):
        if words := shlex.split(line, comments=True):
            yield words


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command as its program does, without running it.

    Raises:
        SystemExit: with another code than 0, as the program, for flags that it does not take.
        AssertionError: for a program, file, target or extra that does not exist.
    """
    program, *words = [word for word in words if word != "..." and not re.match("[A-Z_]+=", word)]
    if program == "srun":
        program, *words = words
    if program == "sbatch":
        assert (ROOT / words[0]).is_file(), words[0]
        program, words = "otter-openclip", ["train", "--config", *words[1:]]
    if program == "torchrun":
        args = torch.distributed.run.get_args_parser().parse_args(words)
        assert args.module
        program, words = f"-m {args.training_script}", args.training_script_args
    if program == "python":
        assert words[0] == "-m", words
        program, words = f"-m {words[1]}", words[2:]
    if program in OURS:
        _ours([*OURS[program], *words], monkeypatch)
    elif program in ("clip_benchmark", "-m clip_benchmark.cli"):
        _clip_benchmark(words, monkeypatch)
    elif program == "make":
        targets = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[0]}:", targets, re.M), words
    elif program == "pip":
        _check_install(words)
    elif program.startswith("-m benchmarks."):
        source = (ROOT / f"{program[3:].replace('.', '/')}.py").read_text(encoding="utf-8")
        named = [word[2:] for word in words if word.startswith("--")]
        assert all(re.search(rf"\b{word}\b", source) for word in named), words
    else:
        assert program in FOREIGN, program


def _clip_benchmark(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if OURS_IN_STOCK & set(words):  # its patched parser has the flags of ours, and one more task
        _ours([word.replace("_multilabel", "_classification") for word in words], monkeypatch)
    else:
        _exit_0(clip_benchmark.cli.get_parser_args, ["clip_benchmark", *words], monkeypatch)


def _exit_0(parse: Callable[[], Any], argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    try:
        parse()
    except SystemExit as stop:  # --help
        if stop.code:
            raise


def _ours(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = words[0]
    with monkeypatch.context() as patch:
        if name == "train":
            patch.setattr(flags, "check_webdataset", lambda *_, **__: None)  # of --zeroshot-data
            training_helpers.parse_args(*words[1:])
        elif name == "eval":
            _exit_0(evaluator._get_parser_args, ["otter-openclip", *words], patch)
        else:
            table = cli.DATA_COMMANDS if name == "data" else cli.COMMANDS
            command = table.get(words[1] if name == "data" else name)
            assert command is not None, words
            patch.setattr(importlib.import_module(command.module), "main", lambda args: 0)
            assert cli.main(words) == 0


def _check_install(words: list[str]) -> None:
    assert words[0] == "install"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for word in words[1:]:
        name, _, extras = word.rstrip("]").partition("[")
        assert name in (".", "otter-openclip"), word
        assert all(f"\n{extra} = [" in project for extra in extras.split(",") if extra), word
