"""The test suite on other Pythons and versions than ``make test`` has: ``nox -s NAME``.

Each environment holds a whole torch, some 6 GB. Arguments after ``--`` are pytest's.
"""

from __future__ import annotations

import re
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv|venv"  # pip seeks the lowest versions for half an hour
nox.options.sessions = ["tests"]
PYTHONS = nox.project.python_versions(nox.project.load_toml("pyproject.toml"), max_version="3.13")


def run_tests(session: nox.Session, *args: str, **env: str) -> None:
    """Pytest with two processes of one thread."""
    words = ("python", "-m", "pytest", "-n", "2", *args, *session.posargs)
    session.run(*words, env={"OMP_NUM_THREADS": "1", **env})


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The newest versions that pyproject.toml allows."""
    session.install("-e", ".[dev]", "pip")  # a test installs the wheel, and uv brings no pip
    run_tests(session)


@nox.session(python=PYTHONS[0])
def lowest(session: nox.Session) -> None:
    """The lowest versions that pyproject.toml allows, open_clip_torch 3.2 among them."""
    dependencies = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
    found = (re.match(r"([\w.-]+)(?:\[\w+\])?[>=]=([\w.]+)", line) for line in dependencies)
    session.install("-e", ".[dev]", "pip", *(f"{match[1]}=={match[2]}" for match in found))
    run_tests(session)


@nox.session(python=PYTHONS[1])
def open_clip_3_2(session: nox.Session) -> None:
    """The oldest open_clip, on otherwise new versions; of transformers it knows only 4."""
    session.install("-e", ".[dev]", "pip", "open_clip_torch==3.2.0", "transformers<5")
    run_tests(session)


@nox.session(python=PYTHONS[1])
def open_clip_4(session: nox.Session) -> None:
    """The seam with open_clip 4.x: ``nox -s open_clip_4 -- CHECKOUT`` of its main branch."""
    if not session.posargs or not Path(session.posargs[0], "src", "open_clip").is_dir():
        session.error("name a checkout of open_clip's main branch: nox -s open_clip_4 -- CHECKOUT")
    checkout = Path(session.posargs.pop(0)).resolve()
    session.install("-e", ".[dev]")
    files = ("open_clip_v4", "frozen", "first_version")
    tests = (f"tests/test_{name}.py" for name in files)
    run_tests(session, *tests, PYTHONPATH=str(checkout / "src"))
