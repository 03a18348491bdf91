# `make train` and `make test` need Python 3.10 or newer, with its venv module, and nothing else: what they use is installed
# into a virtual environment beside this file, once, with the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv

# To choose: make train ENV=Walker2d-v4 ALGO=ppo N=200000 SEED=1
# (not ?=, as some shells and containers have a variable ENV with another meaning)
ENV = Hopper-v4
ALGO = klip_ppo
N = 100000
SEED = 0
SUITE = smoke

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Test processes run side by side, and bit-for-bit comparisons need one thread count.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

.PHONY: help train test test-slow test-versions lint format type tables docs experiments report timings release-check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-15s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(INSTALLED) ## train through RL Zoo, and evaluate: ENV=Hopper-v4 ALGO=klip_ppo N=100000 SEED=0
	$(BIN)/python -m rl_zoo3.train --algo $(ALGO) --env $(ENV) -n $(N) --seed $(SEED) --num-threads 1 \
		--eval-freq 10000 --tensorboard-log logs/tensorboard -P
	@$(BIN)/python -m sb3_klip.zoo.evaluate --algo $(ALGO) --env $(ENV)

test: $(INSTALLED) ## the fast tests
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED) ## the tests that take minutes
	$(PYTEST) -m slow

test-versions: $(INSTALLED) ## test the identity with the lowest and the newest versions of the dependencies
	$(BIN)/nox -s lowest newest

lint: $(INSTALLED) ## check style, formatting and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell

format: $(INSTALLED) ## format the code, and fix its style where possible
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

type: $(INSTALLED) ## check types
	$(BIN)/mypy

tables: $(INSTALLED) ## write the tables of coefficients, variants and modules into README, CONTRIBUTING and docs
	$(BIN)/python docs/tables.py

docs: $(INSTALLED) ## build the documentation into docs/_build, with warnings as errors
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build

experiments: $(INSTALLED) ## run or continue a suite of experiments: SUITE=smoke (paper, coefficients, wide, …)
	$(BIN)/python -m sb3_klip.experiments run --suite $(SUITE)

report: $(INSTALLED) ## make tables and figures of a suite: SUITE=smoke
	$(BIN)/python -m sb3_klip.experiments report logs/experiments/$(SUITE)

timings: $(INSTALLED) ## time updates, trainings and imports, compared with PPO, in 45 minutes (SBX=its/python: with SBX)
	$(BIN)/python timings/overview.py $(if $(SBX),--sbx-python $(SBX))
	$(BIN)/python timings/imports.py

release-check: $(INSTALLED) ## build the wheel and the sdist into dist, and test both in fresh environments
	$(BIN)/nox -s release "installed(kind='wheel')" "installed(kind='sdist')"

clean: ## remove the virtual environment, builds and caches
	rm -rf $(VENV) .nox build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch by itself first: see constraints.txt.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e ".[tests,docs,experiments,plots,extra]"
	touch $@
