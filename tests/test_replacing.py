"""The helper that replaces other packages' names."""

import builtins
import types

import pytest

from otter_openclip.replacing import replaced


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
