"""What is imported when, what commands say to unknown words, and open_clip's knowing our models."""

from __future__ import annotations

import subprocess
import sys

import forks
import pytest
from data_helpers import jpeg, write_files
from patched import ROOT

import otter_openclip
from otter_openclip import cli

HEAVY = ("matplotlib", "open_clip", "open_clip_train", "clip_benchmark", "torch", "webdataset")

# Each line's exit code, and what has been imported by then.
COMMANDS = f"""
import contextlib, io, sys
from otter_openclip import cli
for line in sys.argv[1:]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = cli.main(line.split())
        except SystemExit as stop:
            code = stop.code
    print(code, *sorted({set(HEAVY)!r} & set(sys.modules)))
"""


def test_commands_that_need_no_torch_do_not_import_it(tmp_path):
    table = b"filepath\ttitle\na.jpg\tone\nb.jpg\ttwo\n"
    write_files(tmp_path, {"a.jpg": jpeg(0), "b.jpg": jpeg(1), "t.csv": table})
    fine = [f"{n} --help" for n in cli.COMMANDS if n not in ("train", "eval", "data")]
    fine += [f"data csv --captions {tmp_path}/t.csv --output {tmp_path}/out --workers 2"]
    fine += [f"data inspect {tmp_path}/out --sheet {tmp_path}/sheet.png --workers 1"]
    fine += ["--help", *(f"data {name} --help" for name in cli.DATA_COMMANDS)]
    wrong = [
        "dta",
        "data",
        "data csv --captions nowhere.csv --output out",
        "data inspect nowhere.tar",
        "patch open_clip --target nowhere",
        "export run out --wieghts teacher",
        "convert last.pth.tar out --owerwrite",
        "towers out --image resnet18 --txt folder",
    ]
    # In a fresh process, that has imported nothing.
    line = [sys.executable, "-c", COMMANDS, *fine, *wrong]
    environment = forks.ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["0"] * len(fine) + ["2"] * len(wrong), done.stderr


def test_the_package_has_names_before_it_imports_them():
    done = forks.run("-c", "import otter_openclip; print(dir(otter_openclip))")
    for name in ("DistillationLoss", "EmaTeacher", "LabelSmoothingLoss", "OtterLoss", "sinkhorn"):
        assert repr(name) in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'OterLoss'"):
        otter_openclip.OterLoss  # noqa: B018


@pytest.mark.parametrize(
    "first",
    [
        "from otter_openclip import sinkhorn",
        "from otter_openclip.losses import OtterLoss",
        "import otter_openclip.transport as module; print(type(module).__name__, end=' ')",
    ],
)
def test_sinkhorn_is_the_function_whatever_is_imported_first(first):
    done = forks.run("-c", f"{first}\nimport otter_openclip\nprint(type(otter_openclip.sinkhorn))")
    assert done.stdout.endswith("<class 'function'>\n"), done.stderr
    assert "transport" not in first or done.stdout.startswith("module ")


KNOWN = """
import sys, open_clip, inspect, otter_openclip.model_configs
assert 'otter-tiny-trial' in open_clip.list_models()
assert open_clip.factory._MODEL_CONFIG_PATHS.count(otter_openclip.model_configs.FOLDER) == 1
assert not [finder for finder in sys.meta_path if 'otter' in type(finder).__module__]
print(inspect.getsource(open_clip)[:4])
"""


@pytest.mark.parametrize(
    "code",
    [
        "import otter_openclip, open_clip",
        "import open_clip, otter_openclip",
        "import otter_openclip.preprocessing",
        # looked for but not imported, then a first attempt that fails
        "import importlib.util, otter_openclip, sys\nimportlib.util.find_spec('open_clip')\n"
        "sys.modules['open_clip.factory'] = None\n"
        "try:\n    import open_clip\nexcept ImportError:\n    del sys.modules['open_clip.factory']",
    ],
)
def test_open_clip_knows_our_models(code):
    done = forks.run("-c", code + KNOWN)
    assert done.returncode == 0 and done.stdout == "from\n", done.stderr


def test_messages_that_name_nothing_near_stay():
    for message in ("invalid choice: 'zzz' (choose from 'a', 'b')", "expected one argument"):
        assert cli.name_nearest(message, ["--alpha"]) == message
    quoted = "invalid choice: 'otterr' (choose from 'ls', 'otter')"
    bare = "invalid choice: 'otterr' (choose from ls, otter)"  # Python 3.12 and later
    for message in (quoted, bare):
        assert cli.name_nearest(message, []) == f"{message} (did you mean otter?)"
