# Needs make and Python >= 3.10; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test test-slow types docs demo clean

test: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

types: .venv/installed
	$(BIN)/mypy

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

demo: .venv/towers
	$(BIN)/otter-openclip demo

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# The demo's pretrained towers and icons, 113 MB in three packages.
.venv/towers: .venv/installed
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	touch $@

clean:
	rm -rf .venv site
