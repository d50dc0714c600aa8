"""``otter-openclip patch``: made-up packages and patches, and the repository's own patches.

Nothing installed is ever changed: everything happens in copies under ``tmp_path``.
"""

from __future__ import annotations

import compileall
import difflib
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from patched import copy_packages

from otter_openclip import cli, patching

ROOT = Path(__file__).parents[1]
LINES = [f"line_{n} = {n}\n" for n in range(40)]
MAIN = "".join(LINES)
MAIN_AFTER = "".join(["import sys\n", *LINES[:20], "inserted = 1\n", *LINES[20:30], *LINES[31:]])
LOOP, LOOP_AFTER = "a = 1\nb = 2", "a = 1\nb = 3\n"  # no newline at the end before
METADATA = "Metadata-Version: 2.1\nName: clip-benchmark\nRequires-Dist: torch\n\nText\n"

# path in the patch: (before, after); None: no such file
OPEN_CLIP = {
    "src/open_clip_train/loop.py": (LOOP, LOOP_AFTER),
    "src/open_clip_train/main.py": (MAIN, MAIN_AFTER),
    "src/open_clip_train/old.py": ("gone = 1\n", None),
    "src/open_clip_train/plugins/__init__.py": (None, ""),
    "src/open_clip_train/plugins/losses.py": (None, "X = 1\nY = 2\n"),
}
CLIP_BENCHMARK = {
    "clip_benchmark-7.6.2.dist-info/METADATA": (
        METADATA,
        METADATA.replace("torch\n", "torch\nRequires-Dist: requests\n"),
    ),
    "clip_benchmark/cli.py": (MAIN, MAIN_AFTER),
    "requirements.txt": ("torch\n", "torch\nrequests\n"),
}
CHANGES = {"open_clip": OPEN_CLIP, "clip_benchmark": CLIP_BENCHMARK}


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


def write(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    return root


PACKAGES = {
    "open_clip": {
        "open_clip/__init__.py": "raise RuntimeError('imported')\n",
        "open_clip_train/__init__.py": "",
        "open_clip_train/loop.py": LOOP,
        "open_clip_train/main.py": MAIN,
        "open_clip_train/old.py": "gone = 1\n",
    },
    "clip_benchmark": {
        "clip_benchmark/__init__.py": "raise RuntimeError('imported')\n",
        "clip_benchmark/cli.py": MAIN,
    },
}
INSTALLED = {
    "open_clip_torch-9.9.1.dist-info/METADATA": "Name: open_clip_torch\nVersion: 9.9.1\n",
    "clip_benchmark-7.6.2.dist-info/METADATA": METADATA,
}


def contents(root: Path) -> dict[str, tuple]:
    """Bytes and modes of all files but byte code."""
    return {
        path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mode)
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(autouse=True)
def patches(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "patches"
    for name, changes in (
        ("open_clip_torch-9.9.1", OPEN_CLIP),
        ("clip_benchmark-7.6.2", CLIP_BENCHMARK),
    ):
        parts = [diff_text(path, *pair) for path, pair in changes.items()]
        write(folder, {f"{name}.patch": f"Subject: a seam\n---\n\n{''.join(parts)}-- \n2.39.5\n"})
    monkeypatch.setattr(patching, "PATCHES", (tmp_path / "nowhere", folder))
    return folder


@pytest.fixture
def site(tmp_path) -> Path:
    """A site-packages folder with both projects."""
    packages = PACKAGES["open_clip"] | PACKAGES["clip_benchmark"]
    return write(tmp_path / "site", packages | INSTALLED)


@pytest.fixture
def run(capsys):
    """Run the command; gives exit code, output, errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main(["patch", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_check_says_what_would_change_and_changes_nothing(site, run):
    old = contents(site)
    for flags in ((), ("--check",)):
        code, out, err = run("open_clip", "--target", site, *flags)
        assert (code, err) == (0, "")
        assert f"open_clip_torch in {site}: not patched\n--apply would change" in out
        assert "2\t1\topen_clip_train/main.py\n" in out
        assert "create mode 100644 open_clip_train/plugins/losses.py" in out
    assert contents(site) == old
    assert "Revert before an upgrade" in run("open_clip", "--target", site, "--apply")[1]
    old = contents(site)
    _, out, _ = run("open_clip", "--target", site)
    assert f"in {site}: patched\n--revert would change" in out
    assert "delete mode 100644 open_clip_train/plugins/losses.py" in out
    assert contents(site) == old


@pytest.mark.parametrize(
    ("project", "target", "packages", "checkout"),
    [
        ("open_clip", "bare", "bare", False),
        ("open_clip", "bare/open_clip_train", "bare", False),
        ("open_clip", "flat", "flat", True),
        # The checkout's folder often has the package's name.
        ("open_clip", "open_clip", "open_clip/src", True),
        ("open_clip", "open_clip/src/open_clip", "open_clip/src", True),
        ("clip_benchmark", "bare", "bare", False),
        ("clip_benchmark", "clip_benchmark", "clip_benchmark", True),
    ],
)
def test_layouts(project, target, packages, checkout, tmp_path, run):
    """To the patched bytes and back; what belongs to the other layout is left out."""
    folder = write(tmp_path / packages, PACKAGES[project])
    write(folder, {"requirements.txt": "torch\n"} if checkout else INSTALLED)
    old = contents(folder)
    assert run(project, "--apply", "--target", tmp_path / target)[::2] == (0, "")
    for name, (_, after) in CHANGES[project].items():
        file = folder / name.removeprefix("src/")
        other_layout = "requirements.txt" if not checkout else "clip_benchmark-7.6.2.dist-info"
        if not name.startswith(other_layout):
            assert (file.read_text() if file.exists() else None) == after
        else:
            assert not file.exists()
    assert run(project, "--revert", "--target", tmp_path / target)[::2] == (0, "")
    assert contents(folder) == old


def test_twice_is_no_error(site, run):
    for action, state in (("--revert", "not patched"), ("--apply", "patched")):
        if action == "--apply":
            run("open_clip", "--apply", "--target", site)
        old = contents(site)
        code, out, err = run("open_clip", action, "--target", site)
        assert (code, err) == (0, "")
        assert f": {state}\nNothing to do." in out
        assert contents(site) == old


@pytest.mark.parametrize("action", ["--check", "--apply", "--revert"])
@pytest.mark.parametrize(
    ("patched", "changes", "message"),
    [
        (False, {"main.py": MAIN.replace("= 19", "= 'mine'")}, "main.py:18"),
        (True, {"main.py": MAIN_AFTER.replace("= 31", "= 'mine'")}, "main.py:30"),
        (False, {"main.py": MAIN.replace("\n", "\r\n")}, "main.py:1"),
        (False, {"main.py": MAIN_AFTER}, "main.py:1"),  # as if killed after one file
        (False, {"loop.py": None}, "loop.py: No such file"),
        (False, {"plugins/losses.py": "someone else's\n"}, "losses.py: already exists"),
        (True, {"plugins/losses.py": "X = 1\nY = 2\nmine = 3\n"}, "losses.py"),
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
    old = contents(site)
    code, out, err = run("open_clip", action, "--target", site)
    assert (code, out) == (2, "")
    assert "can be neither applied nor reverted" in err and message in err
    assert "pip install --force-reinstall --no-deps open_clip_torch" in err
    assert contents(site) == old


def test_changes_elsewhere_in_a_file_stay(site, run):
    """Hunks may move; only their context must be there."""
    main = site / "open_clip_train/main.py"
    edited = MAIN.replace("line_10 = 10\n", "line_10 = 10\nmine = 1\nmine = 2\n")
    main.write_text(edited)
    assert run("open_clip", "--apply", "--target", site)[0] == 0
    assert "mine = 2\n" in main.read_text() and "inserted = 1\n" in main.read_text()
    assert run("open_clip", "--revert", "--target", site)[0] == 0
    assert main.read_text() == edited


def test_another_release_is_refused_even_if_git_could_apply_it(site, run):
    info = site / "open_clip_torch-9.9.1.dist-info"
    info.rename(site / "open_clip_torch-9.9.2.dist-info")
    old = contents(site)
    code, _, err = run("open_clip", "--apply", "--target", site)
    assert code == 2
    assert f"no patch for open_clip_torch 9.9.2 in {site}" in err and "that have one: 9.9.1" in err
    assert contents(site) == old


def test_of_several_patches_a_checkout_takes_the_one_that_fits(tmp_path, run, patches):
    """Its version says nothing: clip_benchmark's __version__ is 0.1.0 in every release."""
    (patches / "clip_benchmark-7.0.0.patch").write_text(
        diff_text("clip_benchmark/cli.py", "other\n", "text\n")
    )
    checkout = write(tmp_path / "checkout", PACKAGES["clip_benchmark"])
    write(checkout, {"requirements.txt": "torch\n"})
    assert (
        "Applied clip_benchmark-7.6.2" in run("clip_benchmark", "--apply", "--target", checkout)[1]
    )


def test_targets_without_packages(site, run, tmp_path, monkeypatch):
    monkeypatch.chdir(site)  # what an empty --target must not mean
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        run("open_clip", "--apply", "--target", "")
    for target in (tmp_path / "sight-packages", tmp_path / "file", tmp_path):
        code, _, err = run("open_clip", "--apply", "--target", target)
        assert code == 2 and f"in 0 places of {target}" in err and "give --target" in err


def test_the_installed_package_is_found_without_importing_it(site, tmp_path, run, monkeypatch):
    for name in ("clip_benchmark", "open_clip", "open_clip_train"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(site)  # its __init__ raises
    code, out, err = run("clip_benchmark", "--apply")
    assert (code, err) == (0, "")
    assert f"clip_benchmark in {site}: not patched" in out
    assert (site / "clip_benchmark/cli.py").read_text() == MAIN_AFTER
    other = write(tmp_path / "other", {"open_clip_train/__init__.py": ""})
    monkeypatch.syspath_prepend(other)
    code, _, err = run("open_clip")
    assert code == 2
    assert f"in 2 places of this environment: ['{other}', '{site}']; give --target" in err


def test_no_git(site, tmp_path, run, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run("open_clip", "--apply", "--target", site)
    assert code == 2 and "no git" in err and "install git" in err


def test_inside_a_repository_and_with_settings(tmp_path, site, run, monkeypatch):
    """The repository around the target and the user's settings play no part."""
    settings = "[core]\n\tautocrlf = true\n[apply]\n\twhitespace = error\n"
    monkeypatch.setenv("HOME", str(write(tmp_path / "home", {".gitconfig": settings})))
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    old = contents(site)
    assert run("open_clip", "--apply", "--target", site)[0] == 0
    assert (site / "open_clip_train/main.py").read_bytes() == MAIN_AFTER.encode()
    assert run("open_clip", "--revert", "--target", site)[0] == 0
    assert contents(site) == old


def test_hard_links_are_not_written_through(site, tmp_path, run):
    """uv links site-packages to its cache: the cache keeps the release's bytes."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("main.py", "loop.py", "old.py"):
        os.link(site / "open_clip_train" / name, cache / name)
    old = contents(cache)
    for action in ("--apply", "--revert"):
        assert run("open_clip", action, "--target", site)[0] == 0
        assert contents(cache) == old


@pytest.mark.parametrize("project", patching.PROJECTS)
def test_the_repositorys_patches(project, tmp_path, run, monkeypatch):
    """Each one: applied to a copy of the release it is for, compiled, and taken back to the byte."""
    name = patching.PROJECTS[project].distribution
    (patch,) = (ROOT / "patches").glob(f"{name}-*.patch")
    if (version := distribution(name).version) != patch.stem.rpartition("-")[2]:
        pytest.skip(f"{patch.name} is not for {version}, which is installed")
    monkeypatch.setattr(patching, "PATCHES", (patch.parent,))
    copy = copy_packages(project, tmp_path / "copy")
    old = contents(copy)
    assert "not patched" in run(project, "--apply", "--target", copy)[1]
    assert contents(copy) != old
    assert all(
        compileall.compile_dir(copy / p, quiet=1) for p in patching.PROJECTS[project].packages
    )
    assert run(project, "--revert", "--target", copy)[0] == 0
    assert contents(copy) == old
