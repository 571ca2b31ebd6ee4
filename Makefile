# `make demo` and `make test` work on a fresh machine with Python 3.10 or newer: each makes .venv first.
# PYTHON=python3.12 chooses the interpreter for a new .venv, JOBS=4 the number of test processes.

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format docs matrix package setup clean

help:
	@echo "make demo    three optimizers on real digit images: one table and a report (ARGS='--seeds 5')"
	@echo "make test    the tests (ARGS='tests/test_cli.py -k version')"
	@echo "make test-all  and those that take more than ten seconds each"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff fix and format"
	@echo "make docs    the documentation as a site, in build/site; pictures drawn anew from docs/results"
	@echo "make matrix  the tests with each extra missing, every warning an error, other torches and Pythons (long)"
	@echo "make package wheel and sdist: build, check, install into an empty environment"
	@echo "make setup   .venv for development"
	@echo "make clean   remove .venv and caches"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("nanoadam needs Python 3.10 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)

# The stamps are older than these two files after a change, and the set-up runs again.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[docs]'
	@touch $@

$(VENV)/.nox: | $(BIN)/python
	$(PIP) nox
	@touch $@

setup: $(VENV)/.dev

# Strict: a link or an anchor that leads nowhere is an error. Needs no network.
docs: $(VENV)/.docs
	$(BIN)/python benchmarks/pictures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

matrix: $(VENV)/.dev $(VENV)/.nox
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nox -s without strict versions -- $(ARGS)

package: $(VENV)/.nox
	$(BIN)/nox -s package

demo: $(VENV)/.demo
	$(BIN)/nanoadam demo $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(ARGS)

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
