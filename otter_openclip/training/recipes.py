"""Recipes: ``--config RECIPE``, a YAML file whose keys are the command's flags without their dashes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from otter_openclip.cli import did_you_mean

# The package's own recipes, known by name: inside it once installed, beside it in a checkout.
_INSTALLED = Path(__file__).parents[1] / "configs"
RECIPES = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "configs"


class _Words(yaml.BaseLoader):
    """Takes values as they are written, where YAML 1.1 reads 010 as 8, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As YAML's, or an error that names the line."""
        names = set()
        for key, _ in node.value:
            if (name := str(key.value).replace("_", "-")) in names:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line} has {key.value!r} again; drop one")
            names.add(name)
        return super().construct_mapping(node, deep)


class _Once(argparse.Action):
    """Recipes are not merged: a second one would silently replace the first."""

    def __call__(self, parser: Any, namespace: Any, values: Any, _: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error("argument --config: given more than once; drop all but one")
        setattr(namespace, self.dest, values)


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    """Let ``--config`` appear in the help; :func:`expand_config` is what reads it."""
    parser.add_argument(
        "--config",
        action=_Once,
        metavar="RECIPE",
        default=None,
        help="a recipe of this package by name (an unknown one lists them) or FILE.yaml: flags without "
        "their dashes and their values; flags given here win, --no-SWITCH drops one of its switches",
    )


def expand_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """``argv`` with the flags of its ``--config`` file put before, so that those in ``argv`` win.

    Every value is then checked by ``parser`` itself. A file that cannot be read, an unknown key or a
    value no flag can have ends in ``parser.error``.
    """
    # By the same parser, so that what it takes for --config (--conf, for one) is read as such.
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    if not known.config:
        return list(argv)
    path = _path(parser, known.config)
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _Words)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {path} cannot be read: {' '.join(str(error).split())}")
    if not isinstance(recipe, dict):
        parser.error(f"--config {path} must hold lines 'flag: value', got {type(recipe).__name__}")
    actions = {
        name[2:]: action
        for name, action in parser._option_string_actions.items()
        if name.startswith("--") and action.dest not in ("help", "config", "version")
    }
    # argparse cannot take a switch back, so --no-SWITCH leaves the recipe's out.
    off = {f"--no-{name}" for name, action in actions.items() if action.nargs == 0} & set(argv)
    words: list[str] = []
    for key, value in recipe.items():
        name = str(key).replace("_", "-")
        if name not in actions:
            parser.error(f"--config {path}: unknown key {key!r}{did_you_mean(name, actions)}")
        if f"--no-{name}" not in off:
            try:
                words += _words(name, actions[name], value)
            except ValueError as error:
                parser.error(f"--config {path}: {name} {error}")
    return [*words, *(word for word in argv if word not in off)]


def _path(parser: argparse.ArgumentParser, recipe: str) -> Path:
    """The file ``recipe``, or the package's recipe of that name."""
    path = Path(recipe)
    recipes = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
    if path.is_file() or (path.stem not in recipes and len(path.parts) > 1):
        return path
    if recipe in recipes:
        return recipes[recipe]
    parser.error(
        f"--config {recipe} is neither a file nor a recipe of this package"
        f"{did_you_mean(path.stem, recipes)} The recipes: {', '.join(recipes)}"
    )


def _words(name: str, action: argparse.Action, value: Any) -> list[str]:
    """The words of a command line for one line of a recipe."""
    if action.nargs == 0:
        if _python(value) not in ("True", "False"):
            raise ValueError(f"is a switch: true or false, got {value}")
        return [f"--{name}"] if _python(value) == "True" else []
    if isinstance(value, dict):  # --aug-cfg scale=(0.9,1.0)
        value = [f"{k}={_python(v)}" for k, v in value.items()]
    if not isinstance(value, list):
        return [f"--{name}={value}"]
    if action.nargs is None:
        raise ValueError(f"takes one value, got {value!r}")
    return [f"--{name}", *value]


def _python(value: Any) -> str:
    """A value as Python writes it, numbers in a list without quotes."""
    if isinstance(value, list):
        return f"[{', '.join(map(_python, value))}]"
    return {"true": "True", "false": "False"}.get(str(value).lower(), str(value))
