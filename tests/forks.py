"""Runs commands in forks of one process that has already imported what takes seconds to import.

A request is a line of JSON on stdin: {"module": ..., "argv": [...], "path": [...], "cwd": ...,
"environments": [{...}, ...]}, one fork for each environment, all at once. ``path`` goes before
everything else on ``sys.path``, so it decides which clip_benchmark is imported and which entry points
are found. The reply is a line with (exit code, stdout, stderr) of each fork.
"""

import json
import os
import sys
import tempfile
import traceback
from importlib import import_module


def child(request, environment, files):
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(file.fileno(), descriptor)
    # Not the parent's: those of pipes are block-buffered and hold its text.
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ.update(environment)
    os.chdir(os.path.join(request["cwd"], environment.get("TEST_FOLDER", "")))
    sys.path[:0] = request["path"]
    sys.argv = request["argv"]
    code = 1
    try:
        imported = import_module("clip_benchmark").__file__
        assert any(imported.startswith(f"{path}/") for path in request["path"]), imported
        code = import_module(request["module"]).main() or 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(request):
    started = []
    for environment in request["environments"]:
        files = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        process = os.fork()
        if process == 0:
            child(request, environment, files)
        started.append((process, files))
    replies = []
    for process, files in started:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read().decode())
        replies.append((code, *texts))
    return replies


if __name__ == "__main__":
    for name in ("open_clip", "pycocoevalcap", "sklearn.metrics", "torchvision", "webdataset"):
        import_module(name)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
