"""What holds for the package as a whole: rooms and their imports, names, and other packages' names."""

from __future__ import annotations

import ast
import builtins
import re
import types
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from otter_openclip.replacing import replaced

PACKAGE = Path(__file__).parents[1] / "otter_openclip"
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in MODULES}

# Room -> the rooms that it may import. All may import what is in none, and that no room but ``fast``.
ROOMS = {
    "shards": set(),
    "checkpoints": set(),
    "fast": set(),
    "model_configs": set(),
    "frozen": {"shards"},
    "closed_form": {"shards", "frozen", "evaluation", "model_folders"},
    "data": {"shards"},
    "evaluation": {"shards", "checkpoints"},
    "analysis": {"shards", "frozen", "closed_form"},
    "model_folders": {"checkpoints"},
    "training": {"shards", "checkpoints", "frozen", "evaluation", "closed_form"},
    "compare": {"shards", "frozen", "evaluation", "closed_form", "model_folders", "training"},
}
# Where a command or a name leads to its room.
DOORS = {"__init__": {"model_configs", "closed_form"}, "train": {"training"}}
DOORS["inspect_command"] = {"data", "evaluation"}


def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """The package's modules that a file imports, by their names within the package."""
    found, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            inside = node.module.removeprefix(PACKAGE.name).lstrip(".")
            for alias in node.names:
                name = f"{inside}.{alias.name}".lstrip(".")
                found.add(name if {name, f"{name}.__init__"} & NAMES.keys() else inside)
    return {f"{name}.__init__" if f"{name}.__init__" in NAMES else name for name in found - {""}}


def test_rooms_import_those_below_them():
    for name, path in NAMES.items():
        room = name.split(".")[0] if "." in name else None
        allowed = DOORS.get(name, {"fast"}) if room is None else ROOMS[room] | {room, "fast"}
        used = {other.split(".")[0] for other in imports(path) if "." in other}
        assert used <= allowed, name


def test_there_are_no_circles():
    """A command's flags know where its work is, which they import when it begins."""
    graph = {name: imports(path, everywhere=False) for name, path in NAMES.items()}
    TopologicalSorter(graph).prepare()


def test_what_modules_are_called():
    counts = Counter(path.name for path in MODULES if path.name != "__init__.py")
    assert [name for name, count in counts.items() if count > 1] == []
    assert [path for path in MODULES if hasattr(builtins, path.stem) and path.stem[0] != "_"] == []


def test_text_is_utf_8_whatever_the_locale():
    root = PACKAGE.parent
    for path in [*MODULES, *root.glob("benchmarks/**/*.py"), *root.glob("tests/**/*.py")]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            plain, name = isinstance(call.func, ast.Name), ast.unparse(call.func).rpartition(".")[2]
            modes = call.args[1:2] if plain else call.args[:1]
            mode = ast.unparse(modes[0]) if modes else "'r'" if plain else ""
            opens = name == "open" and mode in ("'r'", "'w'", "'a'")
            if opens or (name in ("read_text", "write_text") and not plain):
                words = {keyword.arg for keyword in call.keywords}
                assert words & {"encoding", None}, f"{path}:{call.lineno}"


def test_other_packages_are_not_changed_by_a_test_library():
    """`replaced` is the one way, with a list of the names at the head of the module."""
    users = [path for path in MODULES if re.search(r"\bmock\b", path.read_text(encoding="utf-8"))]
    assert users == []


def test_names_come_back_whatever_happens():
    stock = types.ModuleType("stock")
    stock.function = function = len
    with replaced((stock, "function", sum), (stock, "open", max)):
        assert stock.function is sum and stock.open is max
    assert stock.function is function and not hasattr(stock, "open") and open is builtins.open
    with pytest.raises(ZeroDivisionError), replaced((stock, "function", None)):
        1 / 0  # noqa: B018
    assert stock.function is function
    # A name that is gone is named.
    with pytest.raises(RuntimeError, match=r"there is no stock\.gone .*pyproject\.toml"):
        with replaced((stock, "function", None), (stock, "gone", None)):
            pass
    assert stock.function is function
