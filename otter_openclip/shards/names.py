"""The shards that a flag names as open_clip's ``--train-data`` does."""

from __future__ import annotations


def shard_names(flag: str, patterns: str) -> list[str]:
    """The shards that ``patterns`` stand for, each once; ValueError, with the ``flag``, for a table."""
    if patterns.endswith((".csv", ".tsv")):
        raise ValueError(f"{flag} {patterns} is a table; make shards with otter-openclip data csv")
    from open_clip_train.data import expand_urls  # torch, only when it is used

    return list(dict.fromkeys(expand_urls(patterns)[0]))
