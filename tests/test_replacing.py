"""The helper that replaces other packages' names."""

import builtins
import types

import pytest

from otter_openclip.replacing import replaced


@pytest.fixture
def stock():
    module = types.ModuleType("stock")
    module.function = lambda value: value + 1
    return module


def test_names_come_back_whatever_happens(stock):
    function = stock.function
    with replaced((stock, "function", lambda value: -value), (stock, "open", lambda path: path)):
        assert stock.function(2) == -2 and stock.open("x") == "x"
    assert stock.function is function and not hasattr(stock, "open") and open is builtins.open
    with pytest.raises(ZeroDivisionError), replaced((stock, "function", None)):
        1 / 0  # noqa: B018
    assert stock.function is function


def test_a_name_that_is_gone_is_named_and_nothing_stays_replaced(stock):
    function = stock.function
    with pytest.raises(RuntimeError, match=r"there is no stock\.gone .*pyproject\.toml"):
        with replaced((stock, "function", None), (stock, "gone", None)):
            pass
    assert stock.function is function
