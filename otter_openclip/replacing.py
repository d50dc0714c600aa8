"""Names of other packages, replaced while a block runs: the only way this package changes them.

Where it does, a table at the head of the module lists the names and says why.
"""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Put each (module or class, name, replacement) in place, and the stock ones back in the end.

    A built-in's name may be given to a module that has none of its own (``open``).

    Raises:
        RuntimeError: if a name is not there, so that the release is not one this package knows.
    """
    missing = object()
    with contextlib.ExitStack() as back:
        for target, name, replacement in replacements:
            stock = vars(target).get(name, missing)
            if stock is not missing:
                back.callback(setattr, target, name, stock)
            elif hasattr(builtins, name):
                back.callback(delattr, target, name)
            else:
                raise RuntimeError(
                    f"there is no {target.__name__}.{name} in the release that is installed; install "
                    "one of the range in otter-openclip's pyproject.toml"
                )
            setattr(target, name, replacement)
        yield
