# Everything runs from a virtual environment of its own, at the versions pinned in constraints.txt.
# Needs make and Python 3.11 or newer; another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.difftune-installed
# Tests run on one thread each, in as many processes.
JOBS ?= 2
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help $(VENV) demo test test-fast test-slow lint types bench results clean

help:
	@echo "make demo       train a LoRA on the embedded model and show before and after"
	@echo "make test       lint, types, fast tests, slow tests"
	@echo "make test-fast  the fast tests only (PYTEST_ARGS=... is passed on)"
	@echo "make lint       ruff"
	@echo "make types      mypy"
	@echo "make bench      measure the overhead over the bare denoiser calls"
	@echo "make results    train every recipe of the embedded models that has no result yet (hours)"
	@echo "make .venv      create or update the environment"
	@echo "make clean      remove the environment, caches and builds; runs/ stays"

$(VENV): $(STAMP)

# The stamp is written last, so that an interrupted install is done again.
$(STAMP): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "the pins in constraints.txt need Python 3.11 or newer, got %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,notebooks,remote,ocr,nsfw]'
	@touch $@

demo: $(STAMP)
	$(BIN)/difftune demo

test: lint types test-fast test-slow

# The tests need no network: one that asks a hub for something fails at once.
test-fast test-slow: export HF_HUB_OFFLINE = 1

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m difftune.bench
	$(BIN)/python -m difftune.bench --tensors 10 50

results: $(STAMP)
	$(BIN)/python -m difftune.results

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov docs/_build
	find difftune algorithms rewards configs tests -name __pycache__ -type d -prune -exec rm -rf {} +
