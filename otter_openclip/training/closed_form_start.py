"""``--init fit``: the closed form is fitted before training, which begins from it."""

from __future__ import annotations

import logging
import time
from argparse import Namespace
from pathlib import Path

import torch
from open_clip_train.data import expand_urls
from open_clip_train.distributed import world_info_from_env

from otter_openclip.closed_form.fitting_run import FIT_FILE, fit_folder
from otter_openclip.frozen.encode import fingerprint
from otter_openclip.frozen.store import FeatureFiles

_POLL = 1.0  # seconds


def start_from_fit(args: Namespace) -> None:
    """Set ``args.model`` and ``args.pair_weights`` to those of a fit, which is made if it is not there.

    It lies in ``--feature-cache``, under a name of model, shards and precision, so that a run that goes
    on finds it; shards and a model's files are known by size and time. Rank 0 makes it, the others wait.

    Raises:
        ValueError: as ``fit``.
    """
    folder = Path(args.feature_cache)
    files = FeatureFiles(folder)
    shards = [files.path(shard).name for shard in expand_urls(args.train_data)[0]]
    towers = sorted(Path(args.model.removeprefix("local-dir:")).glob("*"))
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in towers]
    settings = {"model": args.model, "towers": stamps, "shards": shards}
    out = folder / f"fit-{fingerprint({**settings, 'precision': args.precision})}"
    rank = world_info_from_env()[1]
    if rank == 0 and not (out / FIT_FILE).is_file():
        fit_folder(
            out,
            model=args.model,
            train_data=args.train_data,
            feature_cache=folder,
            precision=args.precision,
            workers=args.workers,
            device=args.device if torch.cuda.is_available() else "cpu",  # as open_clip falls back
            together=False,
            report=print,
        )
        # A warning has made a handler, and open_clip makes its own: every line would be there twice.
        logging.root.handlers.clear()
    # If rank 0 fails, or waits for ranks that do not see its folder, torchrun ends this one.
    while not (out / FIT_FILE).is_file():
        time.sleep(_POLL)
    args.model = f"local-dir:{out}"
    args.pair_weights = args.pair_weights or str(out / FIT_FILE)
