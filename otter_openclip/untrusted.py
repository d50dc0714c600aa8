"""Files of others are data: none of their code runs, whatever they or a config in them ask for.

Replaced while a command runs:

======================================= =============================================================
``torch.load``                         loads tensors and plain values only, also before torch 2.6
                                       and for callers that ask for more (timm 1.0.17)
``dynamic_module_utils.get_cached_...`` Python files beside a model or tokenizer are refused, even if
                                       a config has ``trust_remote_code`` among ``tokenizer_kwargs``
``webdataset.autodecode.pickle``       pickles in shards, which nothing uses, stay bytes
======================================= =============================================================
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from otter_openclip.replacing import replaced


@contextlib.contextmanager
def no_code_from_files() -> Iterator[None]:
    """While active, nothing that is read can run code of its own."""
    import torch  # not for --help
    from transformers import dynamic_module_utils
    from webdataset import autodecode

    stock_load = torch.load

    def load_data(*args: Any, **kwargs: Any) -> Any:
        return stock_load(*args, **kwargs | {"weights_only": True})

    with replaced(
        (torch, "load", load_data),
        (dynamic_module_utils, "get_cached_module_file", _refuse),
        (autodecode, "pickle", SimpleNamespace(loads=bytes)),
    ):
        yield


def _refuse(folder: str | os.PathLike[str], file: str, *_: Any, **__: Any) -> str:
    raise ValueError(
        f"{folder} names Python code of its own, {file}, which is never run: use a tower and tokenizer "
        "that transformers itself knows"
    )
