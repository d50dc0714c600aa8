"""How many samples shards have, as written beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from otter_openclip.shards.write import SIZES_FILE

_LENGTH_FILE = "__len__"  # webdataset's: the samples of a folder's shards together


def listed_samples(shards: Sequence[str]) -> int | None:
    """The samples of ``shards``, each by the ``sizes.json`` beside it; None if there is none at all.

    open_clip itself counts all of them by the first one's. ValueError names a file that is missing,
    cannot be read or does not list a shard.
    """
    folders: dict[str, list[str]] = {}
    for shard in shards:
        folders.setdefault(os.path.dirname(shard), []).append(os.path.basename(shard))
    total, uncounted = 0, []
    for folder, names in folders.items():
        path = Path(folder, SIZES_FILE)
        try:
            if path.exists():
                sizes = json.loads(path.read_text(encoding="utf-8"))
                total += sum(int(sizes[name]) for name in names)
            elif (path := Path(folder, _LENGTH_FILE)).exists():
                total += int(path.read_text(encoding="utf-8"))
            else:
                uncounted.append(folder)
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{path} gives no number of samples: {error}") from error
    if uncounted and len(uncounted) < len(folders):
        raise ValueError(f"{Path(uncounted[0], SIZES_FILE)} is missing, which other shards have")
    return None if uncounted else total
