# `make demo` and `make test` work in a fresh clone with nothing installed but Python 3.11 or newer.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first Python that is new enough; python3 if none is, for the message that says so.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$python; exit; fi; \
	done; echo python3)
WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores > 8 ? 8 : cores)))
EXTRAS := eval,train,viz,quant
# Each worker keeps to one thread, and nothing is fetched but packages.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PYTEST := -m pytest -n $(WORKERS) --dist worksteal

# Runs tests with the Python of an environment and options of pytest: once as it is, and once with Triton's
# interpreter in place of its compiler, which is chosen when the kernels are imported.
define run-tests
@$(TEST_ENVIRONMENT) $(1)/bin/python $(PYTEST) $(2)
@$(TEST_ENVIRONMENT) TRITON_INTERPRET=1 $(1)/bin/python $(PYTEST) $(2) tests/kernels/interpreted
endef

.PHONY: help demo test test-all test-oldest lint bench gpu real train-demo clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.installed  ## segment scenes with the bundled model: images in demo-output/, numbers here
	@HF_HUB_OFFLINE=1 .venv/bin/python -m seg4diff demo --out demo-output

test: .venv/.installed  ## tests that are not slow, with no optional package: minutes
	$(call run-tests,.venv,-m 'not slow')

test-all: .venv/.complete  ## the rest: slow tests, and those of optional packages
	$(call run-tests,.venv,-m 'slow or extra')

test-oldest: .venv-oldest/.complete  ## all tests with the oldest supported versions
	$(call run-tests,.venv-oldest,-W default)

lint: .venv/.complete  ## ruff, mypy and pyright
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .
	@.venv/bin/python -m mypy
	@PYRIGHT_PYTHON_GLOBAL_NODE=0 .venv/bin/python -m pyright --pythonpath .venv/bin/python

bench: .venv/.installed  ## the benchmarks
	@.venv/bin/python -m pytest benchmarks/

gpu:  ## on a GPU, with the Python and packages already there: gpu tests, tuning sweep, benchmarks, into gpu-results/
	@# What fails is told at the end: time on a GPU is dear, the other parts still run.
	@mkdir -p gpu-results; status=0; \
	run() { $(PYTHON) -m "$${@:2}" 2>&1 | tee "gpu-results/$$1.log" || status=1; }; \
	run tests pytest -m gpu -W default tests/kernels; \
	run tuning benchmarks.sweep_tuning --out gpu-results; \
	run benchmarks pytest -s benchmarks/test_joint_attention.py --results gpu-results; \
	if $(PYTHON) -c 'import diffusers, peft' 2>/dev/null; then \
	    run training pytest -s benchmarks/test_magnet.py --results gpu-results; fi; \
	run report benchmarks.report gpu-results; \
	exit $$status

real:  ## real weights to one report, real-results/report.md: make real MODEL=name-or-folder DATA=folder
	@test -n "$(MODEL)" -a -n "$(DATA)" || { echo "usage: make real MODEL=name-or-folder DATA=folder [ARGS='--limit 500']"; exit 2; }
	@$(PYTHON) -m benchmarks.real --model "$(MODEL)" --data-root "$(DATA)" $(ARGS)

train-demo: .venv/.installed  ## train the bundled model again
	@.venv/bin/python -m seg4diff.demo.train

clean:  ## remove the environments and what the targets wrote
	rm -rf .venv .venv-oldest demo-output build dist *.egg-info

# A stamp is written last: an interrupted installation is taken up again. torch comes first, by exact
# version, so that nothing else chooses them.
.venv/%: CONSTRAINTS := .ci/constraints.txt
.venv-oldest/%: CONSTRAINTS := .ci/constraints-oldest.txt
.venv/.installed .venv/.complete: .ci/constraints.txt
.venv-oldest/.installed .venv-oldest/.complete: .ci/constraints-oldest.txt
INSTALL = $(@D)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS)

.venv/.installed .venv-oldest/.installed: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "seg4diff needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; use make PYTHON=/path/to/it")'
	@echo "Installing into $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(INSTALL) torch setuptools wheel
	@$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

.venv/.complete .venv-oldest/.complete: %/.complete: %/.installed
	@echo "Installing optional packages into $(@D)"
	@$(INSTALL) --no-build-isolation --editable '.[dev,lint,$(EXTRAS)]'
	@touch $@
