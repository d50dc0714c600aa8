"""The ``otter-openclip`` command: a table of what there is, and errors that name what is nearest."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import io
import math
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from safetensors import SafetensorError

from otter_openclip import __version__
from otter_openclip.terminating import on_sigterm

# What bad input raises, in this package and in those that read weights.
USER_ERRORS = (ValueError, OSError, RuntimeError, pickle.UnpicklingError, SafetensorError)
_UNKNOWN = "unrecognized arguments: "
MAX_COUNT = 2**31 - 1  # of whole numbers: what seeds and counts fit everywhere


class Command(NamedTuple):
    """A command's module, imported only when the command is used.

    It has ``add_arguments(parser)`` and ``main(args)``; or, where another package parses its flags or it
    has commands of its own (``own_parser``), ``main(argv)``. Both give the exit code.
    """

    module: str
    help: str
    own_parser: bool = False
    resumes: bool = False  # whether the same command goes on where it was stopped
    commands: Mapping[str, Command] | None = None  # of which it is the first word


class Parser(argparse.ArgumentParser):
    """A parser that takes no empty value, and names what is nearest to a wrong word."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        version = f"otter-openclip {__version__}"
        self.add_argument("--version", action="version", version=version)

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> argparse.Namespace:  # type: ignore
        """As argparse's, for ``args`` that are given."""
        self._given = args
        parsed = super().parse_args(args, namespace)
        for action in self._actions:
            if "" in as_list(getattr(parsed, action.dest, None)):
                self.error(f"argument {name_of(action)}: expected a value, got ''")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print the usage and ``message``, and exit with 2."""
        known = self._option_string_actions
        if message.startswith("the following arguments are required"):
            # One of them may be there, misspelt.
            names = [word.split("=")[0] for word in self._given if word.startswith("--")]
            wrong = [name for name in names if not any(flag.startswith(name) for flag in known)]
            message += f"; {name_nearest(_UNKNOWN + ' '.join(wrong), known)}" if wrong else ""
        super().error(name_nearest(message, known))


def needs(module: str, extra: str) -> None:
    """Raise RuntimeError, with the package's extra to install, if ``module`` is missing."""
    if importlib.util.find_spec(module) is None:
        raise RuntimeError(f"{module} is not installed; pip install 'otter-openclip[{extra}]'")


def name_of(action: argparse.Action) -> str:
    """An argument as messages name it."""
    return action.option_strings[-1] if action.option_strings else str(action.metavar)


def as_list(value: Any) -> list[Any]:
    """The values of an argument that may take several."""
    return list(value) if isinstance(value, list | tuple) else [value]


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The one of the ``choices`` that is nearest to ``word``, if it is alike by ``cutoff`` or more."""
    return difflib.get_close_matches(word, list(choices), n=1, cutoff=cutoff)


def number(
    low: float, high: float = math.inf, kind: type = float, *, open_low: bool = False
) -> Callable[[str], float]:
    """A type for argparse: finite numbers of ``kind`` from ``low``, or above it, to ``high``."""
    if kind is int:
        high = min(high, MAX_COUNT)
    bounds = [f"{'above' if open_low else 'at least'} {low:g}"] if low != -math.inf else []
    if high != math.inf and high != MAX_COUNT:
        bounds.append(f"at most {high:g}")
    bound = " and ".join(bounds) or "finite"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {noun}, got {text!r}") from None
        inside = value > low if open_low else value >= low
        if not (inside and value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value

    return parse


positive = number(1, kind=int)


def run_command(
    prog: str, description: str | None, commands: Mapping[str, Command], argv: Sequence[str]
) -> int:
    """Run the one of ``commands`` that ``argv`` begins with; returns its exit code.

    User errors that it raises are printed and give 2; Ctrl-C gives 130 if it goes on when run again.

    Raises:
        SystemExit: for help, and for words that do not parse.
    """
    parser = Parser(prog=prog, description=description)
    names = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        names.add_parser(name, help=command.help, add_help=False)
    name = parser.parse_args(argv[:1]).command
    command = commands[name]
    if command.commands is not None:
        return run_command(f"{prog} {name}", command.help, command.commands, argv[1:])
    module = importlib.import_module(command.module)
    if command.own_parser:
        return module.main(argv[1:])
    parser = Parser(prog=f"{prog} {name}", description=module.__doc__)
    module.add_arguments(parser)
    args = parser.parse_args(argv[1:])
    try:
        return module.main(args)
    except USER_ERRORS as error:
        print(f"{prog} {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if not command.resumes:
            raise
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The end of a message about ``word``: a question, or a full stop if nothing is near."""
    near = nearest(word, choices, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "."


def name_nearest(message: str, known: Iterable[str]) -> str:
    """argparse's error ``message``, with what the user may have meant.

    That is the nearest of the ``known`` flags to each unrecognised one, and the nearest choice to an
    invalid one.
    """
    known = list(known)
    unknown = re.match(rf"(?:the following.*; )?{_UNKNOWN}(.*)", message)
    for word in unknown[1].split() if unknown else []:
        near = nearest(word.split("=")[0], known, cutoff=0.7)
        if word.startswith("--") and near:
            message += f" (did you mean {near[0]}?)"
    invalid = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
    if invalid:
        choices = [choice.strip(" '") for choice in invalid[2].split(",")]
        near = nearest(invalid[1], choices)
        message += f" (did you mean {near[0]}?)" if near else ""
    return message


_DATA = {
    "open-images": ("data.open_images", "Google Open Images' test split, for evaluation"),
    "imagenet10k": ("data.imagenet10k", "Tencent ML-Images' ImageNet part, for evaluation"),
    "cc3m": ("data.cc3m", "Conceptual Captions, for training"),
    "yfcc15m": ("data.yfcc15m", "OpenAI's subset of YFCC100M, for training"),
    "wit": ("data.wit", "Wikipedia image text, for training"),
    "csv": ("data.csv_file", "any table of image paths and captions, for training"),
    "hf": ("data.hf", "a Hugging Face dataset, for training"),
    "inspect": ("inspect_command", "figures, faults and a contact sheet of shards"),
}
DATA_COMMANDS = {
    name: Command(f"otter_openclip.{module}", text, resumes=name != "inspect")
    for name, (module, text) in _DATA.items()
}
COMMANDS = {
    "train": Command(
        "otter_openclip.train", "open_clip's training command with --loss otter", own_parser=True
    ),
    "eval": Command(
        "otter_openclip.evaluation.evaluator",
        "clip_benchmark's eval with F@K, for any number of classes",
        own_parser=True,
    ),
    "export": Command(
        "otter_openclip.model_folders.export_command",
        "turn a training checkpoint into a folder for open_clip.create_model",
    ),
    "convert": Command(
        "otter_openclip.model_folders.convert_command",
        "turn a checkpoint of facebookresearch/OTTER into such a folder",
    ),
    "towers": Command(
        "otter_openclip.model_folders.towers_command",
        "put two pretrained towers, timm's and Hugging Face's, together into such a folder",
    ),
    "fit": Command(
        "otter_openclip.closed_form.fit_command",
        "fit such towers' heads to pairs in closed form, and find the pairs that look wrong",
        resumes=True,
    ),
    "data": Command(
        "otter_openclip.data",
        "turn data sets as downloaded into webdataset shards",
        commands=DATA_COMMANDS,
    ),
    "analyze": Command(
        "otter_openclip.analysis",
        "look at training pairs with a model: are the captions noisy, would OTTER help?",
    ),
    "patch": Command(
        "otter_openclip.patching",
        "patch open_clip or clip_benchmark to know --loss otter, and back",
    ),
    "compare": Command(
        "otter_openclip.compare",
        "tune the losses alike on pairs of your own: does it help, and by how much?",
        resumes=True,
    ),
    "demo": Command(
        "otter_openclip.compare.demo_command",
        "InfoNCE, OTTER and the closed form on icons, with right and with wrong captions",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. User errors are printed and give 2."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # in order with stderr; it may not have all signs
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    with on_sigterm():
        return run_command("otter-openclip", "OTTER as a plugin of open_clip.", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
