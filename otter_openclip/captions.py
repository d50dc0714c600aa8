"""Texts that a model cannot tell apart, because what differs is cut off at its context."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from otter_openclip.pages import shortened


def cut_alike(what: str, texts: Iterable[str], tokenizer: Callable[[list[str]], Any]) -> str | None:
    """A remark with the number of different ``texts`` whose cut tokens are another's; None without any.

    ``what`` they are is said; ``tokenizer`` is open_clip's of the model.
    """
    different = list(dict.fromkeys(texts))
    tokens = tokenizer([*different, ""])
    padding = tokens[-1, -1]  # where an empty text ends
    by_tokens: dict[bytes, list[str]] = {}
    for text, row in zip(different, tokens[:-1], strict=True):
        if row[-1] != padding:
            by_tokens.setdefault(row.numpy().tobytes(), []).append(text)
    alike = [text for group in by_tokens.values() if len(group) > 1 for text in group]
    if not alike:
        return None
    return (
        f"{len(alike)} of {len(different)} different {what} are equal to another once they are cut off "
        f"at the context's {tokens.shape[1]} tokens, so the model cannot tell them apart, e.g. "
        f"{shortened(alike[0], 80)!r}; shorten what they share, or take a longer context"
    )
