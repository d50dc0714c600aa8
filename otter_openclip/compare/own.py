"""The user's own pairs and test set, refused before any work if they cannot be used."""

from __future__ import annotations

from pathlib import Path

from open_clip_train.data import filter_no_caption_or_no_image, tarfile_to_samples_nothrow
from tqdm import tqdm

from otter_openclip.compare.dataset import Data


def find_own(data: str, test: str, *, least: int, most: int) -> Data:
    """The shards in the folder ``data``, as many as ``most`` pairs need, and the test set's folder.

    Raises:
        ValueError: if ``data`` cannot be used or has fewer than ``least`` pairs. ``test`` is not opened.
    """
    folder, test_set = Path(data).resolve(), Path(test).resolve()
    every = sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name))
    if not every:
        raise ValueError(
            f"--data {data}: no such folder, or no .tar in it; otter-openclip data makes such shards"
        )
    shards, pairs = [], 0
    for shard in tqdm(every, "Counting pairs", unit="shard", leave=False):
        samples = tarfile_to_samples_nothrow(iter([{"url": str(shard)}]))  # open_clip's own reading
        pairs += sum(map(filter_no_caption_or_no_image, samples))
        shards.append(shard)
        if pairs >= most:
            break
    if pairs < least:
        raise ValueError(
            f"--data {data}: {pairs} pairs of an image (jpg, png, jpeg, webp) and a caption (txt) in "
            f"{len(every)} shards are fewer than a batch of {least}"
        )
    return Data(shards, pairs, {f"{test_set.parent.name}/{test_set.name}": test_set})
