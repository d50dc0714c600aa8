"""Names of other packages, replaced while a block runs: the only way this package changes them.

Where it does, a table at the head of the module lists the names and says why.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator
from importlib import metadata
from types import FunctionType, MethodType
from typing import Any

# What a call raises when the stock code around it is not the one it was written for.
_DOES_NOT_FIT = (TypeError, AttributeError, KeyError, ImportError)


@contextlib.contextmanager
def replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Put each (module or class, name, replacement) in place, and the stock ones back in the end.

    A built-in's name may be given to a module that has none of its own (``open``). Functions say which
    stock one they stand for when a call does not fit them or fails inside.

    Raises:
        RuntimeError: if a name is not there, so that the release is not one this package knows.
    """
    before: list[tuple[Any, str, Any]] = []
    missing = object()
    try:
        for target, name, replacement in replacements:
            stock = vars(target).get(name, missing)
            label = f"{target.__name__}.{name}"
            if stock is missing and not hasattr(builtins, name):
                raise RuntimeError(f"there is no {label} {_in_release(target)}")
            before.append((target, name, stock))
            setattr(target, name, _labelled(replacement, label, target))
        yield
    finally:
        for target, name, stock in reversed(before):
            if stock is missing:
                delattr(target, name)
            else:
                setattr(target, name, stock)


def _labelled(replacement: Any, label: str, target: Any) -> Any:
    """``replacement``, whose errors name the stock function; anything but a function as it is."""
    if not isinstance(replacement, FunctionType | MethodType):
        return replacement
    signature = inspect.signature(replacement)

    @functools.wraps(replacement)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise RuntimeError(
                f"{label} is called with other arguments than expected ({error}) {_in_release(target)}"
            ) from error
        try:
            return replacement(*args, **kwargs)
        except _DOES_NOT_FIT as error:
            if sys.version_info >= (3, 11):
                error.add_note(f"raised in place of {label} {_in_release(target)}")
            raise

    return call


def _in_release(target: Any) -> str:
    package = getattr(target, "__module__", target.__name__).split(".")[0]
    found = [
        f"{distribution} {metadata.version(distribution)}"
        for distribution in metadata.packages_distributions().get(package, [])
    ]
    return (
        f"(found {', '.join(found) or package}); if its code has changed, install a release of the "
        "range in otter-openclip's pyproject.toml"
    )
