"""Runs Python commands in forks of one process that has already imported what takes seconds to import.

``run`` is ``subprocess.run`` of ``python WORDS`` for a tenth of its time, and ``ranks`` is torchrun.
The process that forks is in `serve`. It has imported other packages only: open_clip, clip_benchmark and
ours are found by each command itself, on its own path. It has computed nothing and has no other thread.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from typing import Any

ROOT = Path(__file__).parent.parent
# What open_clip, its training and clip_benchmark import, and what of transformers is imported late.
IMPORTED = ("torchvision", "timm", "webdataset", "pandas", "ftfy", "fsspec", "requests")
IMPORTED += ("torch.utils.tensorboard", "transformers", "sklearn.metrics", "pycocoevalcap")
LATE = ("AutoConfig", "AutoModel", "AutoTokenizer", "CLIPTokenizer", "PretrainedConfig")
LEFT = ("open_clip", "open_clip_train", "clip_benchmark", "otter_openclip")
# As it is before any test sets something for itself.
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # no thread of pyarrow's
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def run(*words: Any, **settings: Any) -> CompletedProcess[str]:
    """``python WORDS``: ``-c CODE``, ``-m MODULE`` or a script, and arguments.

    Keywords: ``path`` (PYTHONPATH; the repository alone if it is not given), ``cwd`` and ``env``,
    variables to set.
    """
    (done,) = together([words], [settings])
    return done


def ranks(count: int, *words: Any, env: dict[str, str] | None = None, **settings: Any) -> str:
    """``python WORDS`` on each of ``count`` ranks, which must succeed; returns what all of them said."""
    with rank_environments(count) as found:
        every = [{**settings, "env": {**(env or {}), **own}} for own in found]
        done = together([words] * count, every)
    said = "".join(rank.stdout + rank.stderr for rank in done)
    assert not any(rank.returncode for rank in done), said[-6000:]
    return said


@contextlib.contextmanager
def rank_environments(count: int) -> Iterator[list[dict[str, str]]]:
    """The variables that torchrun sets, and the store that its agent serves."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": count}
    common |= {"LOCAL_WORLD_SIZE": count, "TORCHELASTIC_RESTART_COUNT": 0}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": True}
    each = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    yield [{name: str(value) for name, value in one.items()} for one in each]


def together(commands: list[Any], settings: list[dict[str, Any]]) -> list[CompletedProcess[str]]:
    """Run commands at the same time. Where one fails, the others are ended, as torchrun does."""
    requests = [
        {
            "words": [str(word) for word in words],
            "path": [str(folder) for folder in one.get("path", [ROOT])],
            "cwd": str(one.get("cwd") or ROOT),
            "env": one.get("env") or {},
        }
        for words, one in zip(commands, settings, strict=True)
    ]
    process = _process()
    process.stdin.write(json.dumps(requests) + "\n")
    process.stdin.flush()
    replies = json.loads(process.stdout.readline())
    return [CompletedProcess(r["words"], *rest) for r, rest in zip(requests, replies, strict=True)]


@functools.cache
def _process() -> Popen[str]:
    process = Popen([sys.executable, __file__], stdin=PIPE, stdout=PIPE, text=True, env=ENVIRONMENT)
    atexit.register(process.communicate)
    return process


def serve() -> None:
    """Answer requests until there are no more."""
    for line in sys.stdin:
        started = {}
        for request in json.loads(line):
            files = tempfile.TemporaryFile(), tempfile.TemporaryFile()
            process = os.fork()
            if process == 0:
                become(request, *files)
                leave(execute(request["words"]))
            started[process] = files
        codes = wait(set(started))
        replies = [(codes[process], *map(content, files)) for process, files in started.items()]
        print(json.dumps(replies), flush=True)


def wait(running: set[int]) -> dict[int, int]:
    codes = {}
    while running:
        process, status = os.wait()
        running.discard(process)
        codes[process] = os.waitstatus_to_exitcode(status)
        if codes[process]:
            for other in running:
                os.kill(other, signal.SIGTERM)
    return codes


def content(file: Any) -> str:
    file.seek(0)
    return file.read().decode()


def become(request: dict[str, Any], *files: Any) -> None:
    """Take over, in a fork, what a process that was started for the request would have."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in enumerate((nothing, *(file.fileno() for file in files))):
        os.dup2(source, descriptor)
    # Not the parent's: those of pipes are block-buffered and hold its text.
    kept = {"encoding": "utf-8", "closefd": False}
    sys.stdin, sys.stdout = open(0, **kept), open(1, "w", **kept)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", **kept)
    os.environ.update({"PYTHONPATH": os.pathsep.join(request["path"]), **request["env"]})
    os.chdir(request["cwd"])
    sys.path[:1] = ["", *request["path"]]  # instead of this file's folder
    importlib.invalidate_caches()


def execute(words: list[str]) -> int:
    """Do what ``python WORDS`` does; returns its exit code."""
    first, *rest = words
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv = ["-c", *rest[1:]]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = words
            sys.path[0] = os.path.dirname(first)
            runpy.run_path(first, run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(code: int) -> None:
    """Exit as Python does, but for two seconds of freeing all that was imported."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    for name in LATE:
        getattr(sys.modules["transformers"], name)
    assert not sys.modules.keys() & set(LEFT)
    serve()
