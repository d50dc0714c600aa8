"""The test suite on other Pythons and versions than ``make test`` has: ``nox -s NAME``.

Each environment holds a whole torch, some 6 GB. Arguments after ``--`` are pytest's.
"""

from __future__ import annotations

import re

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
