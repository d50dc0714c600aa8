"""What the commands share: a table that leads to their modules, and errors that name what is nearest."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn


class Command(NamedTuple):
    """A command's module, imported only when the command is used.

    It has ``add_arguments(parser)`` and ``main(args)``; or, where another package parses its flags or it
    has commands of its own (``own_parser``), ``main(argv)``. Both give the exit code.
    """

    module: str
    help: str
    own_parser: bool = False


class Parser(argparse.ArgumentParser):
    """A parser whose errors suggest the nearest flag, command or choice."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and ``message``, and exit with 2."""
        super().error(name_nearest(message, self._option_string_actions))


def run_command(
    prog: str, description: str | None, commands: Mapping[str, Command], argv: Sequence[str]
) -> int:
    """Run the one of ``commands`` that ``argv`` begins with; returns its exit code.

    User errors that it raises are printed and give 2.

    Raises:
        SystemExit: for help, and for words that do not parse.
    """
    parser = Parser(prog=prog, description=description)
    names = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        names.add_parser(name, help=command.help, add_help=False)
    name = parser.parse_args(argv[:1]).command
    module = importlib.import_module(commands[name].module)
    if commands[name].own_parser:
        return module.main(argv[1:])
    parser = Parser(prog=f"{prog} {name}", description=module.__doc__)
    parser.set_defaults(command=name)
    module.add_arguments(parser)
    args = parser.parse_args(argv[1:])
    try:
        return module.main(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{prog} {name}: error: {error}", file=sys.stderr)
        return 2


def name_nearest(message: str, known: Iterable[str]) -> str:
    """argparse's error ``message``, with what the user may have meant.

    That is the nearest of the ``known`` flags to each unrecognised one, and the nearest choice to an
    invalid one.
    """
    known = list(known)
    unknown = re.match(r"unrecognized arguments: (.*)", message)
    for word in unknown[1].split() if unknown else []:
        near = difflib.get_close_matches(word.split("=")[0], known, n=1, cutoff=0.7)
        if word.startswith("--") and near:
            message += f" (did you mean {near[0]}?)"
    invalid = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
    if invalid:
        choices = [choice.strip(" '") for choice in invalid[2].split(",")]
        near = difflib.get_close_matches(invalid[1], choices, n=1)
        message += f" (did you mean {near[0]}?)" if near else ""
    return message
