# `make demo` and `make test` work in a fresh clone with nothing installed but Python 3.11 or newer.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first Python that is new enough; python3 if none is, for the message that says so.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$python; exit; fi; \
	done; echo python3)
WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores > 8 ? 8 : cores)))
EXTRAS := demo,dev,eval,train,viz
PYTEST := -m pytest -n $(WORKERS) --dist worksteal
# Each worker keeps to one thread, and nothing is fetched but packages.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: help demo test test-oldest lint bench gpu train-demo clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.installed  ## segment scenes with the bundled model: pictures in demo-output/, numbers here
	@HF_HUB_OFFLINE=1 .venv/bin/python -m seg4diff demo --out demo-output

test: .venv/.installed  ## the whole test suite
	@$(TEST_ENVIRONMENT) .venv/bin/python $(PYTEST)
	@$(TEST_ENVIRONMENT) TRITON_INTERPRET=1 .venv/bin/python $(PYTEST) tests/kernels/interpreted

test-oldest: .venv-oldest/.installed  ## the same suite with the oldest supported versions
	@$(TEST_ENVIRONMENT) .venv-oldest/bin/python $(PYTEST) --deselect tests/test_packaging.py::test_mypy
	@$(TEST_ENVIRONMENT) TRITON_INTERPRET=1 .venv-oldest/bin/python $(PYTEST) tests/kernels/interpreted

lint: .venv/.installed  ## ruff and mypy
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m mypy

bench: .venv/.installed  ## the benchmarks
	@.venv/bin/python -m pytest benchmarks/

gpu:  ## on a GPU, with the Python and packages already there: gpu tests, tuning sweep, benchmarks, into gpu-results/
	@# What fails is told at the end: time on a GPU is dear, the other parts still run.
	@mkdir -p gpu-results; status=0; \
	run() { $(PYTHON) -m "$${@:2}" 2>&1 | tee "gpu-results/$$1.log" || status=1; }; \
	run tests pytest -m gpu tests/kernels; \
	run tuning benchmarks.sweep_tuning --out gpu-results; \
	run benchmarks pytest -s benchmarks/test_joint_attention.py --results gpu-results; \
	if $(PYTHON) -c 'import diffusers, peft' 2>/dev/null; then \
	    run training pytest -s benchmarks/test_magnet.py --results gpu-results; fi; \
	run report benchmarks.report gpu-results; \
	exit $$status

train-demo: .venv/.installed  ## train the bundled model again
	@.venv/bin/python -m seg4diff.demo.train

clean:  ## remove the environments and what the targets wrote
	rm -rf .venv .venv-oldest demo-output build dist *.egg-info

# The stamp is written last: an interrupted installation is taken up again. torch and triton come first, by exact
# version, so that nothing else chooses them.
.venv/.installed: CONSTRAINTS := .ci/constraints.txt
.venv/.installed: .ci/constraints.txt
.venv-oldest/.installed: CONSTRAINTS := .ci/constraints-oldest.txt
.venv-oldest/.installed: .ci/constraints-oldest.txt
.venv/.installed .venv-oldest/.installed: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "seg4diff needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; use make PYTHON=/path/to/it")'
	@echo "Installing into $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	@$(@D)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) triton
	@$(@D)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) setuptools wheel
	@$(@D)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@
