# `make train` and `make test` need Python 3.10 or newer, with its venv module, and nothing else: what they use is installed
# into a virtual environment beside this file, once, with the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv

# To choose: make train ENV=Walker2d-v4 ALGO=ppo N=200000
# (not ?=, as some shells and containers have a variable ENV with another meaning)
ENV = Hopper-v4
ALGO = klip_ppo
N = 100000

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Test processes run side by side, and bit-for-bit comparisons need one thread count.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

.PHONY: train test test-slow lint types clean

train: $(INSTALLED)
	$(BIN)/python -m rl_zoo3.train --algo $(ALGO) --env $(ENV) -n $(N) --num-threads 1 -P

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch by itself first: see constraints.txt.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e ".[tests,plots,extra]"
	touch $@
