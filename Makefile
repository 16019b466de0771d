# `make demo` and `make test` build the environment that they need, on a fresh machine too.
# Variables:  make test PYTHON=python3.12 VENV=/tmp/env PYTEST_ARGS="-k metrics -x"

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
SOAK_ARGS ?=
RESULTS_ARGS ?=
LESSON_ARGS ?=

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-all soak results-gpu lesson-gpu check format clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | \
		while IFS='|' read -r name text; do printf '  make %-11s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.runtime ## train LeNet-5 on the bundled digits, then evaluate it
	$(BIN)/python train.py --model lenet5 --dataset digits --name demo --overwrite
	$(BIN)/python evaluate.py runs/demo

test: $(VENV)/.dev ## prove all promises (PYTEST_ARGS="-k metrics -x" narrows)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/.dev ## also the tests marked slow, as CI does
	$(PYTEST) $(PYTEST_ARGS)

soak: $(VENV)/.dev ## kill trainings at random and compare their ends, 10 minutes (SOAK_ARGS="--kills 200")
	$(BIN)/python benchmarks/soak.py $(SOAK_ARGS)

results-gpu: $(VENV)/.runtime ## train README's rows on one GPU, nine minutes a call (RESULTS_ARGS="--list")
	$(BIN)/python results/make.py $(RESULTS_ARGS)

lesson-gpu: $(VENV)/.runtime ## train the full rows of docs/architectures.md on one GPU (LESSON_ARGS="--photographs DIR")
	for part in ablations digits images models transfer; do \
		$(BIN)/python results/lesson.py $$part --full $(LESSON_ARGS) || exit 1; done

check: $(VENV)/.dev ## formatting, lint, types and spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(VENV)/.dev ## format the code and fix what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and caches; runs/ and data/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build lab.egg-info
	find lab tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp is written only after its install succeeded; a newer pyproject.toml makes it stale.
# Targets never run in parallel: two installs in one environment would damage it.
.NOTPARALLEL:

$(VENV)/.runtime: pyproject.toml
	@echo "Installing the dependencies (PyTorch among them) into $(VENV): minutes, the first time."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml
	@echo "Installing the dependencies, and the test and lint tools, into $(VENV): minutes, the first time."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/.runtime $@
