"""``otter-openclip patch``: the repository's patches on copies of the packages, in every layout.

Nothing installed is ever changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from data_helpers import tree
from patched import ROOT, copy_packages

from otter_openclip import cli, patching

FOLDER = ROOT / "patches"
INFO = "clip_benchmark-1.6.2.dist-info"
pytestmark = pytest.mark.skipif(
    (version("open_clip_torch"), version("clip_benchmark")) != ("3.3.0", "1.6.2"),
    reason="the patches are for other releases than those installed",
)
FILES = {
    "open_clip_train": ("main.py", "params.py", "plugins.py", "train.py"),
    "clip_benchmark": ("cli.py", "datasets/builder.py", "plugins.py"),
}
REQUIREMENTS = "torch\ntorchvision\ntqdm\nscikit-learn>=1.0,<2\nopen_clip_torch>=0.2.1\n"
REQUIREMENTS += "pycocoevalcap\nwebdataset>=0.2.31\ntransformers\n"


@pytest.fixture(autouse=True)
def patches(tmp_path, monkeypatch) -> None:
    """The repository's, and those of a wheel, of which a checkout has none."""
    monkeypatch.setattr(patching, "PATCHES", (tmp_path / "nowhere", FOLDER))


@pytest.fixture
def site(tmp_path) -> Path:
    """A site-packages folder with both projects."""
    copy_packages("open_clip", tmp_path / "site")
    return copy_packages("clip_benchmark", tmp_path / "site")


@pytest.fixture
def run(capsys):
    """Run the command; gives exit code, output, errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main(["patch", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_what_it_says_and_when_there_is_nothing_to_do(site, run):
    stock = tree(site)
    for flags in ((), ("--check",)):
        code, out, err = run("open_clip", "--target", site, *flags)
        assert (code, err) == (0, "")
        assert f"open_clip_torch in {site}: not patched\n--apply would change" in out
        assert "\topen_clip_train/main.py\n" in out
        assert "create mode 100644 open_clip_train/plugins.py" in out
    code, out, _ = run("open_clip", "--target", site, "--revert")
    assert code == 0 and ": not patched\nNothing to do." in out
    assert tree(site) == stock
    assert "Revert before an upgrade" in run("open_clip", "--target", site, "--apply")[1]
    patched = tree(site)
    _, out, _ = run("open_clip", "--target", site)
    assert f"in {site}: patched\n--revert would change" in out
    assert "delete mode 100644 open_clip_train/plugins.py" in out
    code, out, _ = run("open_clip", "--target", site, "--apply")
    assert code == 0 and ": patched\nNothing to do." in out
    assert tree(site) == patched != stock


@pytest.mark.parametrize(
    ("project", "target", "packages", "checkout"),
    [
        ("open_clip", "bare/open_clip_train", "bare", False),
        ("open_clip", "flat", "flat", True),
        # The checkout's folder often has the package's name.
        ("open_clip", "open_clip/src/open_clip", "open_clip/src", True),
        ("clip_benchmark", "bare", "bare", False),
        ("clip_benchmark", "clip_benchmark", "clip_benchmark", True),
    ],
)
def test_layouts(project, target, packages, checkout, tmp_path, run):
    """Patched and taken back to the byte; what belongs to the other layout is left out."""
    folder = copy_packages(project, tmp_path / packages)
    package = project.replace("open_clip", "open_clip_train")
    expected = {f"{package}/{name}" for name in FILES[package]}
    if checkout:
        for info in folder.glob("*.dist-info"):
            shutil.rmtree(info)
        (folder / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
    requirements = folder / ("requirements.txt" if checkout else f"{INFO}/METADATA")
    if project == "clip_benchmark":
        expected.add(str(requirements.relative_to(folder)))
    before = tree(folder)
    assert run(project, "--apply", "--target", tmp_path / target)[::2] == (0, "")
    after = tree(folder)
    assert {name for name in after if before.get(name) != after[name]} == expected
    assert project == "open_clip" or "requests\n" in requirements.read_text(encoding="utf-8")
    assert run(project, "--revert", "--target", tmp_path / target)[::2] == (0, "")
    assert tree(folder) == before


@pytest.mark.parametrize("patched", [False, True])
def test_a_file_that_does_not_fit_leaves_all_alone(patched, site, run):
    if patched:
        run("open_clip", "--apply", "--target", site)
    main = site / "open_clip_train" / "main.py"
    main.write_bytes(main.read_bytes().replace(b"create_loss", b"make_loss"))
    before = tree(site)
    for action in ("--check", "--apply", "--revert"):
        code, out, err = run("open_clip", action, "--target", site)
        assert (code, out) == (2, "")
        assert "can be neither applied nor reverted" in err and "main.py:" in err
        assert "pip install --force-reinstall --no-deps open_clip_torch" in err
    assert tree(site) == before


def test_another_release_is_refused_even_if_git_could_apply_it(site, run):
    (info,) = site.glob("open_clip_torch-*.dist-info")
    info.rename(site / "open_clip_torch-9.9.2.dist-info")
    before = tree(site)
    code, _, err = run("open_clip", "--apply", "--target", site)
    assert code == 2
    assert f"no patch for open_clip_torch 9.9.2 in {site}" in err and "that has one: 3.3.0" in err
    assert tree(site) == before


def test_targets_without_packages_and_no_git(site, run, tmp_path, monkeypatch):
    monkeypatch.chdir(site)  # what an empty --target must not mean
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        run("open_clip", "--apply", "--target", "")
    for target in (tmp_path / "sight-packages", tmp_path / "file", tmp_path):
        code, _, err = run("open_clip", "--apply", "--target", target)
        assert code == 2 and f"in 0 places of {target}" in err and "give --target" in err
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run("open_clip", "--apply", "--target", site)
    assert code == 2 and "no git" in err and "install git" in err


def test_the_installed_package_is_found_without_importing_it(site, tmp_path, run, monkeypatch):
    for name in ("clip_benchmark", "open_clip", "open_clip_train"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (site / "clip_benchmark" / "__init__.py").write_bytes(b"raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(site)
    code, out, err = run("clip_benchmark", "--apply")
    assert (code, err) == (0, "")
    assert f"clip_benchmark in {site}: not patched" in out
    assert (site / "clip_benchmark" / "plugins.py").exists()
    other = tmp_path / "other"
    (other / "open_clip_train").mkdir(parents=True)
    (other / "open_clip_train" / "__init__.py").touch()
    monkeypatch.syspath_prepend(other)
    code, _, err = run("open_clip")
    assert code == 2
    assert f"in 2 places of this environment: ['{other}', '{site}']; give --target" in err


def test_inside_a_repository_with_settings_and_hard_links(tmp_path, site, run, monkeypatch):
    """The repository around the target and the user's settings play no part.

    Nor does uv's cache, which is linked to site-packages: it keeps the release's bytes.
    """
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    settings = "[core]\n\tautocrlf = true\n[apply]\n\twhitespace = error\n"
    (tmp_path / "home" / ".gitconfig").write_text(settings, encoding="utf-8")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "cache").mkdir()
    os.link(site / "open_clip_train" / "main.py", tmp_path / "cache" / "main.py")
    before, cache = tree(site), tree(tmp_path / "cache")
    assert run("open_clip", "--apply", "--target", site)[0] == 0
    assert b"\r" not in (site / "open_clip_train" / "main.py").read_bytes()
    assert tree(site) != before and tree(tmp_path / "cache") == cache
    assert run("open_clip", "--revert", "--target", site)[0] == 0
    assert tree(site) == before


@pytest.mark.parametrize("patch", sorted(FOLDER.glob("*.patch")), ids=lambda path: path.stem)
def test_a_patch_names_no_plugin(patch):
    text = patch.read_text(encoding="utf-8").lower()
    for word in ("otter", "goi", "imagenet10k", "zeroshot_multilabel", "flat_hit"):
        assert word not in text
