# Everything below sets itself up: a virtual environment in .venv, then the package and what the target needs.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Without an NVIDIA driver a fixed CPU torch, with triton beside it for its interpreter and compiler.
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.11 triton>=3.6' || echo 'torch==2.13.0 triton==3.7.1')

.DEFAULT_GOAL := help
.PHONY: help demo test lint types slow bench bench-full bench-report compile-report gpu gpu-kit clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

$(VENV)/.core: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fasttrace needs Python 3.11 or later: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up $(VENV) (once; the downloads take a few minutes)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	@$(PY) -m pip install --quiet $(TORCH)
	@PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --no-build-isolation --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --no-build-isolation --editable ".[test,backends]"
	@touch $@

demo: $(VENV)/.core  ## trace the packaged model and look at what was found (minutes on a CPU)
	@$(PY) -m fasttrace demo --out demo

test: $(VENV)/.test lint types  ## ruff, mypy, the contracts on imports and the whole test suite
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile

slow: $(VENV)/.test  ## the suite with its slow tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile --slow

lint: $(VENV)/.test
	@$(PY) -m ruff check .
	@$(VENV)/bin/lint-imports --no-cache
	@$(PY) -m ruff format --check --quiet . || { $(PY) -m ruff format --diff . ; exit 1; }

types: $(VENV)/.test
	@$(PY) -m mypy

bench: $(VENV)/.test  ## the quick benchmarks beside their rivals, under 5 minutes on 2 cores
	@$(PY) -m bench

bench-full: $(VENV)/.test  ## all benchmarks and scaling curves
	@$(PY) -m bench --full

bench-report: $(VENV)/.test  ## bench/RESULTS.md, with tables and plots from bench/results
	@$(PY) -m bench.report

compile-report: $(VENV)/.test  ## compile every kernel for sm_80, sm_90 and sm_100: registers, spills, shared memory
	@$(PY) -m bench.compile_report

gpu: $(VENV)/.test  ## everything that needs an NVIDIA GPU: tests, kernels beside rivals, engines
	@$(PY) -m bench.gpu --full

gpu-kit: $(VENV)/.core  ## what a borrowed GPU machine without a network lacks, into .kit (see bench/gpu/README.md)
	@$(PY) -m bench.gpu.kit

clean:  ## remove the environment and everything generated
	rm -rf $(VENV) build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
