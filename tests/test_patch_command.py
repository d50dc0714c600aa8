"""``otter-openclip patch``: made-up packages and patches, both tools, and the repository's own patches.

Nothing installed is ever changed: everything happens in copies under ``tmp_path``.
"""

from __future__ import annotations

import compileall
import difflib
import importlib.util
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from otter_openclip import cli, patching
from otter_openclip.patching import diffs, files, targets

ROOT = Path(__file__).parents[1]
LINES = [f"line_{n} = {n}\n" for n in range(40)]
MAIN = "".join(LINES)
MAIN_AFTER = "".join(["import sys\n", *LINES[:20], "inserted = 1\n", *LINES[20:30], *LINES[31:]])
LOOP, LOOP_AFTER = "a = 1\nb = 2", "a = 1\nb = 3\n"  # no newline at the end before
METADATA = (
    "Metadata-Version: 2.1\nName: clip-benchmark\nVersion: {}\nRequires-Dist: torch\n\nText\n"
)

# path in the patch: (before, after); None: no such file
OPEN_CLIP = {
    "README.md": ("Hello\n", "Hello\nplugins\n"),
    "src/open_clip_train/loop.py": (LOOP, LOOP_AFTER),
    "src/open_clip_train/main.py": (MAIN, MAIN_AFTER),
    "src/open_clip_train/old.py": ("gone = 1\n", None),
    "src/open_clip_train/plugins/__init__.py": (None, ""),
    "src/open_clip_train/plugins/losses.py": (None, "X = 1\nY = 2\n"),
}
CLIP_BENCHMARK = {
    "clip_benchmark-7.6.2.dist-info/METADATA": (
        METADATA.format("7.6.2"),
        METADATA.format("7.6.2").replace("torch\n", "torch\nRequires-Dist: requests\n"),
    ),
    "clip_benchmark/cli.py": (MAIN, MAIN_AFTER),
    "requirements.txt": ("torch\n", "torch\nrequests\n"),
}


def diff_text(path: str, before: str | None, after: str | None) -> str:
    """One file's part of a patch, as ``git diff`` writes it."""
    head = [f"diff --git a/{path} b/{path}"]
    head += ["new file mode 100644"] if before is None else []
    head += ["deleted file mode 100644"] if after is None else []
    lines = difflib.unified_diff(
        (before or "").splitlines(keepends=True),
        (after or "").splitlines(keepends=True),
        "/dev/null" if before is None else f"a/{path}",
        "/dev/null" if after is None else f"b/{path}",
    )
    body = [
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    ]
    return "\n".join([*head, "index 1111111..2222222"]) + "\n" + "".join(body)


def patch_text(changes: dict[str, tuple[str | None, str | None]]) -> str:
    parts = [diff_text(path, *pair) for path, pair in changes.items()]
    return "Subject: a plugin seam\n---\n\n" + "".join(parts) + "-- \n2.39.5\n"


def write(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    return root


def before(changes: dict[str, tuple[str | None, str | None]], prefix: str = "") -> dict[str, str]:
    """The files under ``prefix``, which is cut off, as they are before the patch."""
    return {
        name.removeprefix(prefix): old
        for name, (old, _) in changes.items()
        if name.startswith(prefix) and old is not None
    }


OPEN_CLIP_PACKAGES = before(OPEN_CLIP, "src/") | {
    "open_clip/__init__.py": "raise RuntimeError('imported')\n",
    "open_clip/version.py": "__version__ = '9.9.1'\n",
    "open_clip_train/__init__.py": "",
}
CLIP_BENCHMARK_PACKAGE = {
    "clip_benchmark/__init__.py": "__version__ = '0.1.0'\nraise RuntimeError('imported')\n",
    "clip_benchmark/cli.py": MAIN,
}


def snapshot(root: Path, compiled: bool = False) -> dict[str, tuple]:
    """Bytes, times, inodes and modes of all files; directories too."""
    return {
        path.relative_to(root).as_posix(): (path.is_file() and path.read_bytes(), *facts)
        for path in sorted(root.rglob("*"))
        if compiled or "__pycache__" not in path.parts
        for status in [path.lstat()]
        for facts in [(status.st_mode, status.st_ino, status.st_mtime_ns) if path.is_file() else ()]
    }


def contents(root: Path) -> dict[str, tuple]:
    """Bytes and modes only."""
    return {name: facts[:2] for name, facts in snapshot(root).items()}


@pytest.fixture(autouse=True)
def patches(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "patches"
    folder.mkdir()
    (folder / "open_clip_torch-9.9.1.patch").write_text(patch_text(OPEN_CLIP))
    (folder / "clip_benchmark-7.6.2.patch").write_text(patch_text(CLIP_BENCHMARK))
    monkeypatch.setattr(patching, "PATCHES", (tmp_path / "nowhere", folder))
    return folder


@pytest.fixture
def site(tmp_path) -> Path:
    """A site-packages folder with both projects."""
    return write(
        tmp_path / "site",
        OPEN_CLIP_PACKAGES
        | {
            "open_clip_torch-9.9.1.dist-info/METADATA": "Name: open_clip_torch\nVersion: 9.9.1\n",
            "torch-2.0.dist-info/METADATA": "Name: torch\nVersion: 2.0\n",
        }
        | CLIP_BENCHMARK_PACKAGE
        | {"clip_benchmark-7.6.2.dist-info/METADATA": METADATA.format("7.6.2")},
    )


@pytest.fixture(params=diffs.TOOLS)
def tool(request, tmp_path, monkeypatch) -> str:
    """Only one of the two tools on PATH."""
    only(request.param, tmp_path, monkeypatch)
    return request.param


def only(tool: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    if tool is not None:
        program = shutil.which(tool)
        if program is None:
            pytest.skip(f"{tool} is not installed")
        (folder / tool).symlink_to(program)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture
def run(capsys):
    """Run the command; gives exit code, output, errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main(["patch", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_check_says_what_would_change_and_changes_nothing(site, run, tool):
    old = snapshot(site)
    for flags in ((), ("--check",)):
        code, out, err = run("open_clip", "--target", site, *flags)
        assert (code, err) == (0, "")
        assert out.splitlines() == [
            f"open_clip_torch 9.9.1, installed in {site}: not patched",
            "  change    open_clip_train/loop.py  +1 -1",
            "  change    open_clip_train/main.py  +2 -1",
            "  remove    open_clip_train/old.py  +0 -1",
            "  add       open_clip_train/plugins/__init__.py  +0 -0",
            "  add       open_clip_train/plugins/losses.py  +2 -0",
            "  left out  README.md (only a source checkout has it)",
            "--apply would change 5 files as above. Nothing was changed.",
        ]
    assert snapshot(site) == old
    run("open_clip", "--target", site, "--apply")
    old = snapshot(site)
    _, out, _ = run("open_clip", "--target", site)
    assert f"in {site}: patched\n" in out
    assert "  restore   open_clip_train/main.py  +1 -2\n" in out
    assert "  add       open_clip_train/old.py  +1 -0\n" in out
    assert "  remove    open_clip_train/plugins/losses.py  +0 -2\n" in out
    assert "--revert would change 5 files" in out
    assert snapshot(site) == old


def layouts(tmp_path: Path) -> dict[str, tuple[Path, Path, bool]]:
    """name: (--target, the packages' folder, is it a checkout) for open_clip."""
    checkout = {"pyproject.toml": "[project]\nname = 'open_clip_torch'\n\n[tool]\nversion = '1'\n"}
    checkout |= before({"README.md": OPEN_CLIP["README.md"]})
    bare = write(tmp_path / "bare", OPEN_CLIP_PACKAGES)
    flat = write(tmp_path / "flat", OPEN_CLIP_PACKAGES | checkout)
    # the checkout's folder often has the package's name
    src = write(tmp_path / "git/open_clip", checkout)
    write(src / "src", OPEN_CLIP_PACKAGES)
    return {
        "plain copy": (bare, bare, False),
        "package folder": (bare / "open_clip_train", bare, False),
        "flat checkout": (flat, flat, True),
        "src checkout": (src, src / "src", True),
        "src folder": (src / "src", src / "src", True),
        "package in src": (src / "src/open_clip", src / "src", True),
    }


@pytest.mark.parametrize(
    "layout",
    [
        "plain copy",
        "package folder",
        "flat checkout",
        "src checkout",
        "src folder",
        "package in src",
    ],
)
def test_layouts_of_open_clip(layout, tmp_path, run, tool):
    target, folder, checkout = layouts(tmp_path)[layout]
    root = folder.parent if folder.name == "src" else folder
    old = contents(root)
    code, out, err = run("open_clip", "--apply", "--target", target)
    assert (code, err) == (0, "")
    assert ("left out" in out) is not checkout
    assert f"Applied open_clip_torch-9.9.1.patch with {tool}" in out
    assert (folder / "open_clip_train/main.py").read_text() == MAIN_AFTER
    assert (folder / "open_clip_train/loop.py").read_text() == LOOP_AFTER
    assert (folder / "open_clip_train/plugins/__init__.py").read_bytes() == b""
    assert (folder / "open_clip_train/plugins/losses.py").read_text() == "X = 1\nY = 2\n"
    assert not (folder / "open_clip_train/old.py").exists()
    if checkout:
        assert (root / "README.md").read_text() == "Hello\nplugins\n"
    code, out, err = run("open_clip", "--revert", "--target", target)
    assert (code, err) == (0, "")
    assert contents(root) == old


def test_layouts_of_clip_benchmark(tmp_path, site, run, tool):
    checkout = write(
        tmp_path / "checkout",
        CLIP_BENCHMARK_PACKAGE | {"requirements.txt": "torch\n", "setup.py": SETUP.format("7.6.2")},
    )
    for root, there, not_there in (
        (site, "clip_benchmark-7.6.2.dist-info/METADATA", "requirements.txt"),
        (checkout, "requirements.txt", "clip_benchmark-7.6.2.dist-info/METADATA"),
    ):
        old = contents(root)
        code, out, _ = run("clip_benchmark", "--apply", "--target", root)
        assert code == 0
        assert f"left out  {not_there}" in out
        assert (root / there).read_text() == CLIP_BENCHMARK[there][1]
        assert (root / "clip_benchmark/cli.py").read_text() == MAIN_AFTER
        assert run("clip_benchmark", "--revert", "--target", root)[0] == 0
        assert contents(root) == old


def test_twice_is_no_error(site, run):
    for action, state in (("--revert", "not patched"), ("--apply", "patched already")):
        if action == "--apply":
            run("open_clip", "--apply", "--target", site)
        old = snapshot(site)
        code, out, err = run("open_clip", action, "--target", site)
        assert (code, err) == (0, "")
        assert f"Nothing to do: {state}." in out
        assert snapshot(site) == old


def test_a_stopped_run_can_be_completed_or_taken_back(site, run, tool):
    untouched = contents(site)
    (site / "open_clip_train/main.py").write_text(MAIN_AFTER)  # as if killed after one file
    _, out, _ = run("open_clip", "--target", site)
    assert "patched in part (1 of 5 files)" in out
    assert "  as it is  open_clip_train/main.py\n" in out
    assert run("open_clip", "--apply", "--target", site)[0] == 0
    assert f"in {site}: patched\n" in run("open_clip", "--target", site)[1]
    (site / "open_clip_train/loop.py").write_text(LOOP)
    assert run("open_clip", "--revert", "--target", site)[0] == 0
    assert contents(site) == untouched


@pytest.mark.parametrize("action", ["--check", "--apply", "--revert"])
def test_a_changed_file_leaves_everything_alone(action, site, run, tool):
    main = site / "open_clip_train/main.py"
    main.write_text(MAIN.replace("line_19 = 19", "line_19 = 'mine'"))
    old = snapshot(site, compiled=True)
    code, out, err = run("open_clip", action, "--target", site)
    assert (code, out) == (2, "")
    assert f"{main}: hunk 2 of 3 (line 18) does not fit" in err
    assert "changed otherwise" in err and "Nothing was changed" in err
    assert "pip install --force-reinstall --no-deps open_clip_torch==9.9.1" in err
    assert "loop.py" not in err
    assert snapshot(site, compiled=True) == old


def test_a_changed_file_of_a_patched_target_names_the_hunk(site, run, tool):
    run("open_clip", "--apply", "--target", site)
    main = site / "open_clip_train/main.py"
    main.write_text(MAIN_AFTER.replace("line_31 = 31", "line_31 = 'mine'"))
    old = snapshot(site)
    code, _, err = run("open_clip", "--revert", "--target", site)
    assert code == 2
    assert f"{main}: hunk 3 of 3 (line 30) does not fit" in err
    assert snapshot(site) == old


def test_changes_elsewhere_in_a_file_stay(site, run, tool):
    """Hunks may move; only their context must be there."""
    main = site / "open_clip_train/main.py"
    own = MAIN.replace("line_10 = 10\n", "line_10 = 10\nmine = 1\nmine = 2\n")
    main.write_text(own)
    assert run("open_clip", "--apply", "--target", site)[0] == 0
    assert "mine = 2\n" in main.read_text() and "inserted = 1\n" in main.read_text()
    assert run("open_clip", "--revert", "--target", site)[0] == 0
    assert main.read_text() == own


def test_missing_and_extra_files(site, run, tool):
    (site / "open_clip_train/loop.py").unlink()
    write(site, {"open_clip_train/plugins/losses.py": "someone else's\n"})
    old = snapshot(site)
    code, _, err = run("open_clip", "--apply", "--target", site)
    assert code == 2
    assert f"{site / 'open_clip_train/loop.py'}: is missing" in err
    assert f"{site / 'open_clip_train/plugins/losses.py'}: exists already" in err
    assert snapshot(site) == old


def test_a_new_file_that_was_changed_is_not_removed(site, run, tool):
    run("open_clip", "--apply", "--target", site)
    losses = site / "open_clip_train/plugins/losses.py"
    losses.write_text("X = 1\nY = 2\nmine = 3\n")
    assert run("open_clip", "--revert", "--target", site)[0] == 2
    assert losses.read_text() == "X = 1\nY = 2\nmine = 3\n"


def test_crlf_files_are_left_alone(site, run, tool):
    main = site / "open_clip_train/main.py"
    main.write_bytes(MAIN.replace("\n", "\r\n").encode())
    old = snapshot(site)
    code, _, err = run("open_clip", "--apply", "--target", site)
    assert code == 2 and f"{main}: hunk 1 of 3" in err
    assert snapshot(site) == old


def test_wrong_version(site, run, patches):
    (site / "open_clip_torch-9.9.1.dist-info").rename(site / "open_clip_torch-9.9.2.dist-info")
    (patches / "open_clip_torch-9.8.0.patch").write_text("")
    code, _, err = run("open_clip", "--apply", "--target", site)
    assert code == 2
    assert "no patch for open_clip_torch 9.9.2" in err
    assert str(site / "open_clip_torch-9.9.2.dist-info") in err
    assert "there are patches for: 9.8.0, 9.9.1." in err


def test_two_versions(site, run):
    shutil.copytree(
        site / "open_clip_torch-9.9.1.dist-info", site / "Open_Clip.Torch-9.9.0.dist-info"
    )
    code, _, err = run("open_clip", "--target", site)
    assert code == 2 and "2 versions" in err and "Open_Clip.Torch-9.9.0.dist-info" in err


SETUP = """
import setuptools
with open('README.md') as file:
    text = file.read()
setuptools.setup(name='clip_benchmark', long_description=text, version='{}')
"""


def test_no_version(tmp_path, run):
    """clip_benchmark.__version__ is 0.1.0 in every release, and someone else's setup.py says nothing."""
    copy = write(tmp_path / "copy", CLIP_BENCHMARK_PACKAGE)
    for setup in (None, SETUP.replace("clip_benchmark", "lab-tools").format("7.6.2"), "oops ("):
        if setup is not None:
            (copy / "setup.py").write_text(setup)
        code, _, err = run("clip_benchmark", "--target", copy)
        assert code == 2
        assert f"cannot tell which version of clip_benchmark is in {copy}" in err
        assert "0.1.0" not in err


def test_version_of_a_pyproject(tmp_path, run):
    text = "[project]\nname = 'clip-benchmark'\nversion = '7.6.2'\n"
    write(tmp_path / "fork/src", CLIP_BENCHMARK_PACKAGE)
    write(tmp_path / "fork", {"pyproject.toml": text, "requirements.txt": "torch\n"})
    code, out, _ = run("clip_benchmark", "--target", tmp_path / "fork")
    assert code == 0
    assert f"clip_benchmark 7.6.2, checkout {tmp_path / 'fork'}: not patched" in out


def test_upstreams_checkout_of_clip_benchmark_1_6_2_says_1_6_1(tmp_path, run):
    """PyPI's 1.6.2 is upstream's main branch, whose setup.py was not raised; the code tells."""
    release = targets.PROJECTS["clip_benchmark"].unraised[0]
    checkout = write(tmp_path / "c", CLIP_BENCHMARK_PACKAGE | {"setup.py": SETUP.format("1.6.1")})
    assert "no patch for clip_benchmark 1.6.1" in run("clip_benchmark", "--target", checkout)[2]
    installed = Path(importlib.util.find_spec("clip_benchmark").origin).parents[1]
    write(checkout, {release.file: (installed / release.file).read_text()})
    assert "no patch for clip_benchmark 1.6.2" in run("clip_benchmark", "--target", checkout)[2]


def test_target_typo(tmp_path, run):
    code, _, err = run("open_clip", "--target", tmp_path / "sight-packages")
    assert code == 2 and f"{tmp_path / 'sight-packages'}: no such folder" in err
    code, _, err = run("open_clip", "--target", tmp_path)
    assert code == 2 and "no open_clip/ or open_clip_train/" in err and "Fix: give" in err


@pytest.mark.parametrize(
    "arguments", [("open_clp",), ("open_clip", "--check", "--apply"), ("open_clip", "--revrt"), ()]
)
def test_usage_errors(arguments, run):
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)


def test_the_installed_package_is_found_without_importing_it(site, run, monkeypatch):
    monkeypatch.delitem(sys.modules, "clip_benchmark", raising=False)
    monkeypatch.syspath_prepend(site)  # its __init__ raises
    code, out, err = run("clip_benchmark", "--apply")
    assert (code, err) == (0, "")
    assert f"clip_benchmark 7.6.2, installed in {site}: not patched" in out
    assert (site / "clip_benchmark/cli.py").read_text() == MAIN_AFTER


def test_packages_of_two_places(site, tmp_path, run, monkeypatch):
    other = write(tmp_path / "other", {"open_clip_train/__init__.py": ""})
    for name in ("open_clip", "open_clip_train"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(site)
    monkeypatch.syspath_prepend(other)
    code, _, err = run("open_clip")
    assert code == 2
    assert f"open_clip in {site}, open_clip_train in {other}. Fix: give --target" in err


def test_git_goes_before_patch(site, run):
    if not all(shutil.which(tool) for tool in diffs.TOOLS):
        pytest.skip("needs both git and patch")
    assert "with git: 5 files" in run("open_clip", "--apply", "--target", site)[1]


def test_a_git_that_does_not_run_is_passed_over(site, tmp_path, run, monkeypatch):
    only("patch", tmp_path, monkeypatch)
    (tmp_path / "bin/git").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/git").chmod(0o755)
    assert "with patch: 5 files" in run("open_clip", "--apply", "--target", site)[1]


def test_neither_tool(site, tmp_path, run, monkeypatch):
    only(None, tmp_path, monkeypatch)
    old = snapshot(site)
    code, _, err = run("open_clip", "--apply", "--target", site)
    assert code == 2 and "neither git nor patch" in err and "Fix: install git" in err
    assert snapshot(site) == old


def test_inside_repositories_with_changes_and_settings(tmp_path, site, run, monkeypatch):
    """The target's repository, the temporary directory's, and the user's settings play no part."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    home = write(
        tmp_path / "home",
        {
            ".gitconfig": "[core]\n\tautocrlf = true\n[apply]\n\twhitespace = error\n"
            "[user]\n\tname = a\n\temail = a@example.com\n",
            ".config/git/attributes": "* text eol=crlf\n",
        },
    )
    monkeypatch.setenv("HOME", str(home))
    for folder in (site, tmp_path / "temporary/deep"):
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, {".gitattributes": "* text eol=crlf\n"})
        subprocess.run(["git", "init", "-q", folder], check=True)
        subprocess.run(["git", "-C", folder, "add", "."], check=True, capture_output=True)
        subprocess.run(["git", "-C", folder, "commit", "-qm", "all"], check=True)
    write(site, {"open_clip/__init__.py": "changed = 1\n"})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary/deep"))
    for name, value in (("COUNT", "1"), ("KEY_0", "apply.ignoreWhitespace"), ("VALUE_0", "change")):
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    monkeypatch.setenv("GIT_DIR", str(site / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(site))
    monkeypatch.chdir(site / "open_clip")
    old, index = contents(site), (site / ".git/index").read_bytes()
    assert run("open_clip", "--apply", "--target", site)[0] == 0
    assert (site / "open_clip_train/main.py").read_bytes() == MAIN_AFTER.encode()
    assert (site / ".git/index").read_bytes() == index
    assert run("open_clip", "--revert", "--target", site)[0] == 0
    assert contents(site) == old
    write(site, {"open_clip_train/main.py": MAIN.replace("line_19 =", "line_19  =")})
    assert run("open_clip", "--apply", "--target", site)[0] == 2
    assert not list((tmp_path / "temporary/deep").glob("otter-*"))


def test_hard_links_are_not_written_through_and_modes_stay(site, tmp_path, run):
    """uv links site-packages to its cache: the cache keeps the release's bytes."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("main.py", "loop.py", "old.py"):
        os.link(site / "open_clip_train" / name, cache / name)
    (site / "open_clip_train/main.py").chmod(0o640)
    old, modes = snapshot(cache), contents(site)
    run("open_clip", "--apply", "--target", site)
    assert (site / "open_clip_train/main.py").stat().st_mode & 0o777 == 0o640
    assert snapshot(cache) == old
    run("open_clip", "--revert", "--target", site)
    assert snapshot(cache) == old
    assert contents(site) == modes


def test_a_link_is_replaced_not_followed(site, tmp_path, run):
    real = tmp_path / "real.py"
    (site / "open_clip_train/main.py").rename(real)
    (site / "open_clip_train/main.py").symlink_to(real)
    assert run("open_clip", "--apply", "--target", site)[0] == 0
    assert real.read_text() == MAIN
    assert (site / "open_clip_train/main.py").read_text() == MAIN_AFTER


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("action", ["--apply", "--revert"])
@pytest.mark.parametrize("fails_at", range(3))
def test_a_failing_replacement_takes_the_others_back(
    action, fails_at, links, site, run, monkeypatch
):
    if action == "--revert":
        run("open_clip", "--apply", "--target", site)
    old = snapshot(site)
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == fails_at + 1:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    def no_links(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.os, "replace", failing)
    if not links:
        monkeypatch.setattr(files.os, "link", no_links)
        old = {name: (facts[0], facts[-1]) for name, facts in old.items()}
    code, _, err = run("open_clip", action, "--target", site)
    assert code == 2
    assert f"cannot write {calls[fails_at]}: No space left on device. No file was changed" in err
    new = snapshot(site)
    assert (new if links else {name: (facts[0], facts[-1]) for name, facts in new.items()}) == old


def test_a_file_that_refuses_is_left_alone(site, run, monkeypatch):
    """As one that is immutable does, however often it is tried; it was not changed, nothing is left."""
    old = {name: (facts[0], facts[-1]) for name, facts in snapshot(site).items()}
    replace = os.replace

    def refusing(source, target):
        if Path(target).name == "main.py":
            raise OSError(1, "Operation not permitted", str(target))
        replace(source, target)

    def no_links(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(files.os, "replace", refusing)
    monkeypatch.setattr(files.os, "link", no_links)
    code, _, err = run("open_clip", "--apply", "--target", site)
    assert code == 2 and "No file was changed" in err
    assert {name: (facts[0], facts[-1]) for name, facts in snapshot(site).items()} == old


def test_targets_that_are_no_folder(site, run, tmp_path, monkeypatch):
    monkeypatch.chdir(site)
    assert "--target is empty" in run("open_clip", "--apply", "--target", "")[2]
    (tmp_path / "file").touch()
    assert "not a folder" in run("open_clip", "--apply", "--target", tmp_path / "file")[2]


def test_a_failure_while_writing_leaves_nothing(site, run, monkeypatch):
    old = snapshot(site)
    write_one, calls = files._write, []

    def failing(path, *rest, **more):
        calls.append(path)
        write_one(path, *rest, **more)
        if len(calls) == 4:  # the last: folders have been made by then
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write", failing)
    code, _, err = run("open_clip", "--apply", "--target", site)
    assert code == 2 and "No file was changed" in err
    assert snapshot(site) == old


def test_an_interrupt_takes_everything_back(site, run, monkeypatch):
    old = snapshot(site)
    replace, calls = os.replace, []

    def interrupted(source, target):
        replace(source, target)
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("open_clip", "--apply", "--target", site)
    assert snapshot(site) == old


def test_what_cannot_be_put_back_is_named(site, run, monkeypatch):
    main = site / "open_clip_train/main.py"
    replace = os.replace

    def failing(source, target):
        if Path(target) == main and Path(source).read_text() == MAIN:
            raise OSError(30, "Read-only file system", str(target))
        if Path(target).name == "losses.py":
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    code, _, err = run("open_clip", "--apply", "--target", site)
    assert code == 2 and "No file was changed" not in err
    original = next(main.parent.glob(".main.py.*"))
    assert f"could not be put back: {main} (its original is {original})" in err
    assert original.read_text() == MAIN
    assert (main.parent / "loop.py").read_text() == LOOP


def test_read_only_folder(site, run, patches, monkeypatch):
    """As an ordinary user, also where the tests run as root."""
    with tempfile.TemporaryDirectory() as name:  # tmp_path is root's alone
        folder = Path(name).resolve()
        folder.chmod(0o755)
        copy = shutil.copytree(site, folder / "site")
        monkeypatch.setattr(patching, "PATCHES", (shutil.copytree(patches, folder / "patches"),))
        (copy / "open_clip_train").chmod(0o555)
        old = snapshot(copy)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            check = run("open_clip", "--target", copy)
            code, _, err = run("open_clip", "--apply", "--target", copy)
        finally:
            if root:
                os.seteuid(0)
        assert check[0] == 0
        assert code == 2
        assert f"cannot write {copy}/open_clip_train/" in err and "Permission denied" in err
        assert f"No file was changed. Fix: make {copy / 'open_clip_train'} writable" in err
        assert snapshot(copy) == old
        (copy / "open_clip_train").chmod(0o755)


def test_compiled_code_goes(site, run):
    """Unchecked .pyc files are used whatever their source says; so is the new folder's cache."""
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    main = site / "open_clip_train/main.py"
    stale = py_compile.compile(main, invalidation_mode=mode)
    kept = py_compile.compile(site / "open_clip_train/__init__.py", invalidation_mode=mode)
    run("open_clip", "--apply", "--target", site)
    assert not Path(stale).exists() and Path(kept).exists()
    compileall.compile_dir(site / "open_clip_train", quiet=1)
    assert (site / "open_clip_train/plugins/__pycache__").is_dir()
    run("open_clip", "--revert", "--target", site)
    assert not (site / "open_clip_train/plugins").exists()
    assert not Path(stale).exists()


def test_new_files_of_an_installation_are_named(site, run):
    _, out, _ = run("open_clip", "--apply", "--target", site)
    assert "Revert before an upgrade: pip does not know of open_clip_train/plugins/__init" in out
    _, out, _ = run("clip_benchmark", "--apply", "--target", site)
    assert "Revert before an upgrade" not in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello\n", "not a patch"),
        (
            "diff --git a/x b/y\nsimilarity index 90%\nrename from x\nrename to y\n",
            "nothing changes",
        ),
        ("diff --git a/x b/x\nold mode 100644\nnew mode 100755\n", "'old mode 100644' is unsupp"),
        ("diff --git a/x b/x\nindex 1..2\nGIT binary patch\nliteral 1\n", "unsupported"),
        ("--- a/x/../../y\n+++ b/x/../../y\n@@ -1 +1 @@\n-a\n+b\n", "not a path"),
        ("--- x.py\n+++ x.py\n@@ -1 +1 @@\n-a\n+b\n", "'x.py' is not a path"),
        ("--- a/x\n+++ b/x\n@@ -1,3 +1,3 @@\n a\n-b\n+c\n", "cut short"),
    ],
)
def test_what_is_no_patch(text, message, tmp_path):
    (tmp_path / "p.patch").write_text(text)
    with pytest.raises(ValueError, match=r"p\.patch.*" + message):
        diffs.parse_patch(tmp_path / "p.patch")


def test_parsed_counts(tmp_path):
    """Lines that look like headers inside a hunk are contents; ``diff -u``'s headers do too."""
    text = "--- a/x.py\t2020\n+++ b/x.py\t2021\n@@ -1,2 +1,2 @@\n--- a/y.py\n+++ b/y.py\n z\n"
    (tmp_path / "p.patch").write_text(text)
    (diff,) = diffs.parse_patch(tmp_path / "p.patch")
    assert (diff.path, diff.added, diff.removed, diff.hunks) == ("x.py", 1, 1, ((1, 1),))
    assert diff.text.decode() == text


def test_where_a_hunk_fits_twice_the_nearer_place_decides(tmp_path, run, patches, tool):
    """Text before and after the patch in one file: the state is the one that can be taken back."""
    one, two = "x\na\nb\nc\n", "x\na\nn\nb\nc\n"
    (patches / "open_clip_torch-9.9.1.patch").write_text(
        "--- a/src/open_clip_train/main.py\n+++ b/src/open_clip_train/main.py\n"
        "@@ -2,3 +2,4 @@\n a\n+n\n b\n c\n"
    )
    copy = write(tmp_path / "copy", OPEN_CLIP_PACKAGES)
    main = copy / "open_clip_train/main.py"
    for unpatched, patched in ((one + two, two + two), (one + one, two + one)):
        main.write_text(unpatched)
        assert run("open_clip", "--apply", "--target", copy)[0] == 0
        assert main.read_text() == patched
        assert ": patched\n" in run("open_clip", "--target", copy)[1]
        assert run("open_clip", "--revert", "--target", copy)[0] == 0
        assert main.read_text() == unpatched


def test_a_file_that_fits_in_both_directions_is_refused(site, run, monkeypatch):
    monkeypatch.setattr(patching, "transform", lambda diff, content, tool, reverse: b"x")
    old = snapshot(site)
    code, _, err = run("open_clip", "--apply", "--target", site)
    assert code == 2 and "it can be applied and reverted as well" in err
    assert snapshot(site) == old


def test_a_broken_trainer_can_be_reverted(site, tmp_path):
    """The command imports neither of the packages it patches the code of."""
    broken = "raise RuntimeError('broken')\n"
    write(tmp_path / "broken", {f"{name}/__init__.py": broken for name in BROKEN})
    path = os.pathsep.join([str(tmp_path / "broken"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "otter_openclip.cli", "patch", "open_clip", "--target", site],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert "no patch for open_clip_torch 9.9.1" in done.stderr, done.stderr
    assert done.returncode == 2


BROKEN = ("open_clip_train", "clip_benchmark")
REAL = sorted((ROOT / "patches").glob("*.patch"))
assert len(REAL) == 2


@pytest.mark.parametrize("patch", REAL, ids=[path.stem for path in REAL])
def test_the_repositorys_patches(patch, tmp_path, run, tool, monkeypatch):
    """Each one: applied to a copy of the release it is for, compiled, and taken back to the byte."""
    name, _, version = patch.stem.rpartition("-")
    if distribution(name).version != version:
        pytest.skip(f"{name} {version} is not installed")
    monkeypatch.setattr(patching, "PATCHES", (patch.parent,))
    key, project = next(item for item in targets.PROJECTS.items() if item[1].distribution == name)
    source = Path(importlib.util.find_spec(project.packages[0]).origin).parents[1]
    copy = tmp_path / "copy"
    for folder in (*project.packages, f"{name}-{version}.dist-info"):
        shutil.copytree(
            source / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.json")
        )
    old = contents(copy)
    code, out, err = run(key, "--apply", "--target", copy)
    assert (code, err) == (0, "")
    assert "not patched" in out
    for package in project.packages:
        assert compileall.compile_dir(copy / package, quiet=1)
    assert contents(copy) != old
    assert run(key, "--revert", "--target", copy)[0] == 0
    assert contents(copy) == old


def test_no_package_is_forgotten():
    """pyproject.toml lists the packages one by one, because patches/ is mapped into them."""
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in (ROOT / "otter_openclip").rglob("*.py")
    }
    data = {"otter_openclip.model_configs", "otter_openclip.patches"}
    assert set(settings["packages"]) == folders | data
    assert settings["package-dir"] == {"otter_openclip.patches": "patches"}


def test_the_wheel_has_the_patches(tmp_path):
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools before 77 cannot read pyproject.toml")
    tree = tmp_path / "tree"
    for name in ("otter_openclip", "patches"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "patches/made_up-1.0.patch").write_text("")
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    patches = {path.name for path in (ROOT / "patches").iterdir()} | {"made_up-1.0.patch"}
    assert {f"otter_openclip/patches/{name}" for name in patches} <= set(names)
    assert "otter_openclip/model_configs/otter-glyph.json" in names
    assert not [name for name in names if name.startswith("patches/")]
