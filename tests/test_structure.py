"""What holds for the package as a whole."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "otter_openclip"
MODULES = sorted(PACKAGE.rglob("*.py"))


def test_no_two_modules_are_called_alike():
    counts = Counter(path.name for path in MODULES if path.name != "__init__.py")
    assert [name for name, count in counts.items() if count > 1] == []


def test_other_packages_are_not_changed_by_a_test_library():
    """`replaced` is the one way, with a list of the names at the head of the module."""
    users = [path for path in MODULES if re.search(r"\bmock\b", path.read_text())]
    assert users == []
