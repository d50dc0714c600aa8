"""``otter-openclip patch``: made-up packages and patches, and the repository's own patches.

Nothing installed is ever changed: everything happens in copies under ``tmp_path``.
"""

from __future__ import annotations

import compileall
import difflib
import importlib.util
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from otter_openclip import cli, patching

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


@pytest.fixture
def run(capsys):
    """Run the command; gives exit code, output, errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main(["patch", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_check_says_what_would_change_and_changes_nothing(site, run):
    old = snapshot(site)
    for flags in ((), ("--check",)):
        code, out, err = run("open_clip", "--target", site, *flags)
        assert (code, err) == (0, "")
        assert out.splitlines() == [
            f"open_clip_torch 9.9.1 in {site}: not patched",
            "  left out  README.md",
            "  change    src/open_clip_train/loop.py",
            "  change    src/open_clip_train/main.py",
            "  remove    src/open_clip_train/old.py",
            "  add       src/open_clip_train/plugins/__init__.py",
            "  add       src/open_clip_train/plugins/losses.py",
            "Nothing was changed; --apply would, 5 files.",
        ]
    assert snapshot(site) == old
    _, out, _ = run("open_clip", "--target", site, "--apply")
    assert "Revert before an upgrade: pip does not know of the files" in out
    assert "Revert before" not in run("clip_benchmark", "--target", site, "--apply")[1]
    old = snapshot(site)
    _, out, _ = run("open_clip", "--target", site)
    assert f"in {site}: patched\n" in out
    assert "  add       src/open_clip_train/old.py\n" in out
    assert "  remove    src/open_clip_train/plugins/losses.py\n" in out
    assert "--revert would, 5 files" in out
    assert snapshot(site) == old


@pytest.mark.parametrize(
    ("target", "packages", "checkout"),
    [
        ("bare", "bare", False),
        ("bare/open_clip_train", "bare", False),
        ("flat", "flat", True),
        ("open_clip", "open_clip/src", True),  # the checkout's folder often has the package's name
        ("open_clip/src", "open_clip/src", True),
        ("open_clip/src/open_clip", "open_clip/src", True),
    ],
)
def test_layouts_of_open_clip(target, packages, checkout, tmp_path, run):
    folder = write(tmp_path / packages, OPEN_CLIP_PACKAGES)
    root = folder.parent if folder.name == "src" else folder
    if checkout:
        write(
            root,
            {"pyproject.toml": PYPROJECT.format("open_clip_torch", ""), "README.md": "Hello\n"},
        )
    old = contents(root)
    code, out, err = run("open_clip", "--apply", "--target", tmp_path / target)
    assert (code, err) == (0, "")
    assert ("left out" in out) is not checkout
    assert "Applied open_clip_torch-9.9.1.patch" in out
    for name, (_, after) in OPEN_CLIP.items():
        file = folder / name.removeprefix("src/") if name.startswith("src/") else root / name
        if checkout or file.parent != root:
            assert (file.read_text() if file.exists() else None) == after
    assert run("open_clip", "--revert", "--target", tmp_path / target)[::2] == (0, "")
    assert contents(root) == old


def test_layouts_of_clip_benchmark(tmp_path, site, run):
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


def test_a_stopped_run_can_be_completed_or_taken_back(site, run):
    untouched = contents(site)
    (site / "open_clip_train/main.py").write_text(MAIN_AFTER)  # as if killed after one file
    _, out, _ = run("open_clip", "--target", site)
    assert "patched in part (1 of 5 files)" in out
    assert "  as it is  src/open_clip_train/main.py\n" in out
    assert run("open_clip", "--apply", "--target", site)[0] == 0
    assert f"in {site}: patched\n" in run("open_clip", "--target", site)[1]
    (site / "open_clip_train/loop.py").write_text(LOOP)
    assert run("open_clip", "--revert", "--target", site)[0] == 0
    assert contents(site) == untouched


@pytest.mark.parametrize("action", ["--check", "--apply", "--revert"])
@pytest.mark.parametrize(
    ("patched", "changes", "message"),
    [
        (
            False,
            {"main.py": MAIN.replace("= 19", "= 'mine'")},
            "main.py: patch failed: .*main.py:18",
        ),
        (True, {"main.py": MAIN_AFTER.replace("= 31", "= 'mine'")}, "main.py: .*reversed: .*:30"),
        (False, {"main.py": MAIN.replace("\n", "\r\n")}, "main.py: patch failed: .*main.py:1"),
        (False, {"loop.py": None}, "loop.py: .*No such file"),
        (False, {"plugins/losses.py": "someone else's\n"}, "losses.py: .*already exists"),
        (True, {"plugins/losses.py": "X = 1\nY = 2\nmine = 3\n"}, "losses.py: "),
        (True, {"plugins/__init__.py": "mine = 3\n"}, "__init__.py: "),
    ],
)
def test_a_file_that_does_not_fit_leaves_all_alone(patched, changes, message, action, site, run):
    if patched:
        run("open_clip", "--apply", "--target", site)
    for name, text in changes.items():
        if text is None:
            (site / "open_clip_train" / name).unlink()
        else:
            write(site / "open_clip_train", {name: text})
    old = snapshot(site, compiled=True)
    code, out, err = run("open_clip", action, "--target", site)
    assert (code, out) == (2, "")
    assert re.search(message, err) and "Nothing was changed" in err
    assert "pip install --force-reinstall --no-deps open_clip_torch==9.9.1" in err
    assert err.count("\n  ") == 1  # the other files are not named
    assert snapshot(site, compiled=True) == old


def test_changes_elsewhere_in_a_file_stay(site, run):
    """Hunks may move; only their context must be there."""
    main = site / "open_clip_train/main.py"
    own = MAIN.replace("line_10 = 10\n", "line_10 = 10\nmine = 1\nmine = 2\n")
    main.write_text(own)
    assert run("open_clip", "--apply", "--target", site)[0] == 0
    assert "mine = 2\n" in main.read_text() and "inserted = 1\n" in main.read_text()
    assert run("open_clip", "--revert", "--target", site)[0] == 0
    assert main.read_text() == own


def test_where_a_hunk_fits_twice_the_nearer_place_decides(tmp_path, run, patches):
    """Text before and after the patch in one file: the state is the one that can be taken back."""
    one, two = "x\na\nb\nc\n", "x\na\nn\nb\nc\n"
    (patches / "open_clip_torch-9.9.1.patch").write_text(
        "diff --git a/src/open_clip_train/main.py b/src/open_clip_train/main.py\n"
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
    monkeypatch.setattr(patching, "_git_apply", lambda patch, name, content, reverse: content)
    old = snapshot(site)
    code, _, err = run("open_clip", "--apply", "--target", site)
    assert code == 2 and "fits in both directions" in err
    assert snapshot(site) == old


def test_versions_of_an_installation(site, run, patches):
    (patches / "open_clip_torch-9.8.0.patch").write_text("")
    info = site / "open_clip_torch-9.9.1.dist-info"
    other = shutil.copytree(info, site / "open_clip_torch-9.9.2.dist-info")
    code, _, err = run("open_clip", "--target", site)
    assert code == 2 and info.name in err and other.name in err and "Fix: reinstall" in err
    shutil.rmtree(info)
    code, _, err = run("open_clip", "--apply", "--target", site)
    assert code == 2
    assert f"no patch for open_clip_torch 9.9.2 in {site} (the version is from {other})" in err
    assert "there are patches for: 9.8.0, 9.9.1." in err


SETUP = """
import setuptools
with open('README.md') as file:
    text = file.read()
setuptools.setup(name='clip_benchmark', long_description=text, version='{}')
"""
PYPROJECT = "[project]\nname = '{}'\n{}\n[tool.x]\nversion = '1'\n"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("x", "", "cannot tell which version of clip_benchmark is in {}"),
        ("setup.py", SETUP.replace("clip_benchmark", "lab-tools").format("7.6.2"), "cannot tell"),
        ("setup.py", "oops (", "cannot tell"),
        ("pyproject.toml", PYPROJECT.format("clip-benchmark", ""), "cannot tell"),
        ("pyproject.toml", PYPROJECT.format("lab-tools", "version = '7.6.2'"), "cannot tell"),
        ("pyproject.toml", PYPROJECT.format("clip-benchmark", "version = '7.6.2'"), ""),
        ("setup.py", SETUP.format("7.6.2"), ""),
        ("setup.py", SETUP.format("1.6.1"), "no patch for clip_benchmark 1.6.1 in {}"),
    ],
)
def test_versions_of_checkouts(file, text, message, tmp_path, run):
    """clip_benchmark.__version__ is 0.1.0 in every release, and others' setup.py say nothing."""
    for root in (tmp_path / "flat", tmp_path / "fork"):
        packages = root / "src" if root.name == "fork" else root
        write(packages, CLIP_BENCHMARK_PACKAGE)
        write(root, {file: text, "requirements.txt": "torch\n"})
        code, out, err = run("clip_benchmark", "--target", root)
        if not message:
            assert code == 0 and f"clip_benchmark 7.6.2 in {root}: not patched" in out
        else:
            assert code == 2 and message.format(packages if "cannot" in message else root) in err
            assert "0.1.0" not in err


def test_upstreams_checkout_of_clip_benchmark_1_6_2_says_1_6_1(tmp_path, run):
    """PyPI's 1.6.2 is upstream's main branch, whose setup.py was not raised; the code tells."""
    file = patching.UNRAISED[0]
    checkout = write(tmp_path / "c", CLIP_BENCHMARK_PACKAGE | {"setup.py": SETUP.format("1.6.1")})
    installed = Path(importlib.util.find_spec("clip_benchmark").origin).parents[1]
    write(checkout, {file: (installed / file).read_text()})
    assert "no patch for clip_benchmark 1.6.2" in run("clip_benchmark", "--target", checkout)[2]


def test_targets_without_packages(site, run, tmp_path, monkeypatch):
    monkeypatch.chdir(site)  # what an empty --target must not mean
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        run("open_clip", "--apply", "--target", "")
    for target in (tmp_path / "sight-packages", tmp_path / "file", tmp_path):
        code, _, err = run("open_clip", "--apply", "--target", target)
        assert code == 2 and f"in 0 places of --target '{target}'" in err and "Fix: give" in err


@pytest.mark.parametrize(
    "arguments", [("open_clp",), ("open_clip", "--check", "--apply"), ("open_clip", "--revrt"), ()]
)
def test_usage_errors(arguments, run):
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)


def test_the_installed_package_is_found_without_importing_it(site, tmp_path, run, monkeypatch):
    for name in ("clip_benchmark", "open_clip", "open_clip_train"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(site)  # its __init__ raises
    code, out, err = run("clip_benchmark", "--apply")
    assert (code, err) == (0, "")
    assert f"clip_benchmark 7.6.2 in {site}: not patched" in out
    assert (site / "clip_benchmark/cli.py").read_text() == MAIN_AFTER
    other = write(tmp_path / "other", {"open_clip_train/__init__.py": ""})
    monkeypatch.syspath_prepend(other)
    code, _, err = run("open_clip")
    assert code == 2
    assert f"in 2 places of this environment: ['{other}', '{site}']. Fix: give --target" in err


def test_no_git(site, tmp_path, run, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    old = snapshot(site)
    code, _, err = run("open_clip", "--apply", "--target", site)
    assert code == 2 and "no git" in err and "Fix: install git" in err
    assert snapshot(site) == old


def test_inside_repositories_with_changes_and_settings(tmp_path, site, run, monkeypatch):
    """The target's repository, the temporary directory's, and the user's settings play no part."""
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


class Refusing:
    """A function of os that fails at its Nth call, or for some arguments, before or after its work."""

    def __init__(self, function, fails, error, after=False):
        self.function, self.fails, self.error, self.after = function, fails, error, after
        self.calls = []

    def __call__(self, *args, **kwargs):
        self.calls.append(args)
        fails = (
            self.fails(*args, **kwargs) if callable(self.fails) else len(self.calls) == self.fails
        )
        if fails and not self.after:
            raise self.error
        result = self.function(*args, **kwargs)
        if fails:
            raise self.error
        return result


NO_SPACE = OSError(28, "No space left on device")


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("action", ["--apply", "--revert"])
@pytest.mark.parametrize(
    ("name", "refusing"),
    [
        *(("replace", Refusing(os.replace, n, NO_SPACE)) for n in (1, 2, 3)),
        ("replace", Refusing(os.replace, 2, KeyboardInterrupt(), after=True)),
        # as a file that is immutable does, however often it is tried
        (
            "replace",
            Refusing(os.replace, lambda _, to: to.name == "main.py", OSError(1, "Immutable")),
        ),
        ("fsync", Refusing(os.fsync, 3, NO_SPACE)),
        ("unlink", Refusing(os.unlink, lambda path, **_: str(path).endswith("/old.py"), NO_SPACE)),
    ],
)
def test_a_failure_takes_everything_back(name, refusing, action, links, site, run, monkeypatch):
    """Bytes, times and links; where the file system has no links, bytes and times."""
    if action == "--revert":
        run("open_clip", "--apply", "--target", site)
    old = snapshot(site)
    refusing.calls = []
    with monkeypatch.context() as patched:
        patched.setattr(os, name, refusing)
        if not links:
            patched.setattr(
                os, "link", Refusing(os.link, lambda *_, **__: True, OSError(95, "No links"))
            )
        try:
            code, _, err = run("open_clip", action, "--target", site)
        except KeyboardInterrupt:
            code, err = None, ""
    if code == 0:  # nothing to unlink in this direction
        own = sys.version_info < (3, 11)  # pathlib then has an unlink of its own
        assert name == "unlink" and (action == "--revert" or own)
        return
    assert code is None or ("cannot write: " in err and "No file was changed. Fix: make" in err)
    new = snapshot(site)
    if not links:
        old, new = ({n: (f[0], f[-1]) for n, f in files.items()} for files in (old, new))
    assert new == old


def test_what_cannot_be_put_back_is_named(site, run, monkeypatch):
    main = site / "open_clip_train/main.py"

    def fails(source, target):
        return Path(target).name == "loop.py" or Path(source).read_text() == MAIN

    monkeypatch.setattr(os, "replace", Refusing(os.replace, fails, NO_SPACE))
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
        assert "cannot write: " in err and f"Permission denied: '{copy}/open_clip_train/" in err
        assert "No file was changed. Fix: make the folders writable" in err
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


REAL = sorted((ROOT / "patches").glob("*.patch"))
assert len(REAL) == 2


@pytest.mark.parametrize("patch", REAL, ids=[path.stem for path in REAL])
def test_the_repositorys_patches(patch, tmp_path, run, monkeypatch):
    """Each one: applied to a copy of the release it is for, compiled, and taken back to the byte."""
    name, _, version = patch.stem.rpartition("-")
    if distribution(name).version != version:
        pytest.skip(f"{name} {version} is not installed")
    monkeypatch.setattr(patching, "PATCHES", (patch.parent,))
    key = next(key for key, distribution in patching.PROJECTS.items() if distribution == name)
    packages = patching.PACKAGES[key]
    source = Path(importlib.util.find_spec(packages[0]).origin).parents[1]
    copy = tmp_path / "copy"
    for folder in (*packages, f"{name}-{version}.dist-info"):
        shutil.copytree(
            source / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.json")
        )
    old = contents(copy)
    code, out, err = run(key, "--apply", "--target", copy)
    assert (code, err) == (0, "")
    assert "not patched" in out
    for package in packages:
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
    mapped = {f"otter_openclip.{name}": name for name in ("configs", "patches")}
    data = {"otter_openclip.model_configs", *mapped}
    assert set(settings["packages"]) == folders | data
    assert settings["package-dir"] == mapped
