"""A folder of features, found by the digest of what they are of.

Any number of processes may write to it at once: each adds files of its own, whole or not at all. A file
carries its own digest in its name, so a damaged one is noticed, and its features are made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from otter_openclip.files import written_whole

DIGEST = "S16"  # numpy's dtype of keys
_SUFFIX = ".safetensors"
_STALE = 3600  # seconds after which an unfinished file is a killed run's


def digest(*parts: bytes) -> bytes:
    """16 bytes that stand for ``parts``."""
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def _digest_of(file: Path) -> str:
    found = hashlib.blake2b(digest_size=16)
    with file.open("rb") as content:
        while chunk := content.read(1 << 22):
            found.update(chunk)
    return found.hexdigest()


class FeatureStore:
    """Features (views, width) of any number of things, memory-mapped.

    An entry of NaN says that there are none: the thing cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        """Open ``folder``, made if need be; files that are damaged are left out with a warning.

        They are removed where that is allowed: the folder may be one that can only be read.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("*.tmp"):
            with contextlib.suppress(OSError):  # another run has just finished it, or owns it
                if time.time() - file.stat().st_mtime > _STALE:
                    file.unlink()
        self._names: list[str] = []
        self._files: list[Tensor] = []
        self._starts = np.zeros(1, np.int64)
        self._keys = np.zeros(0, DIGEST)
        self._rows = np.zeros(0, np.int64)
        self.refresh()

    def refresh(self) -> None:
        """Take in the files that were added since."""
        keys = [self._keys]
        rows = [self._rows]
        for file in sorted(self.folder.glob(f"*{_SUFFIX}")):
            if file.name in self._names:
                continue
            try:
                whole = _digest_of(file) == file.name.split(".")[0]
                names, features = _load(file) if whole else (None, None)
            except FileNotFoundError:  # another run found it damaged
                continue
            if not whole:
                logging.warning(f"{file} is damaged; its features are made again")
                with contextlib.suppress(OSError):
                    file.unlink()
                continue
            self._names.append(file.name)
            self._files.append(features)
            keys.append(names)
            rows.append(self._starts[-1] + np.arange(len(names)))
            self._starts = np.append(self._starts, self._starts[-1] + len(names))
        self._keys, first = np.unique(np.concatenate(keys), return_index=True)
        self._rows = np.concatenate(rows)[first]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files = [_load(self.folder / name)[1] for name in self._names]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Row of each of the digests ``keys`` (N,), -1 for those that are not there; int64."""
        if not len(self._keys):
            return np.full(len(keys), -1, np.int64)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._rows[at], -1)

    def take(self, rows: np.ndarray, views: np.ndarray | int = 0) -> Tensor:
        """(N, width) features of ``rows`` (N,), of the given view of each."""
        at = np.searchsorted(self._starts, rows, side="right") - 1
        views = np.broadcast_to(views, rows.shape)
        out = self._files[0].new_empty(len(rows), self._files[0].shape[2])
        for index in np.unique(at):
            here = at == index
            where = torch.from_numpy(rows[here] - self._starts[index])
            out[torch.from_numpy(here)] = self._files[index][where, torch.from_numpy(views[here])]
        return out

    def readable(self, rows: np.ndarray) -> np.ndarray:
        """Whether each of ``rows`` (N,) has features; bool."""
        return ~self.take(rows)[:, 0].isnan().numpy() if len(rows) else np.zeros(0, bool)

    def add(self, keys: Iterable[bytes], features: Tensor) -> None:
        """Write ``features`` (N, views, width) of the digests ``keys``, whole or not at all."""
        names = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16)
        content = safetensors.torch.save({"keys": names, "features": features.contiguous()})
        name = f"{digest(content).hex()}.{secrets.token_hex(4)}{_SUFFIX}"
        with written_whole(self.folder / name) as file:
            file.write(content)


def _load(file: Path) -> tuple[np.ndarray, Tensor]:
    """Keys (N,) and features (N, views, width), the latter still on the disk."""
    found = safetensors.torch.load_file(file)
    keys = found["keys"].numpy().reshape(-1).view(DIGEST)
    return keys, found["features"]
