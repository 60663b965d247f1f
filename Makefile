# The two commands: `make demo` (environment, install, main job) and `make test` (environment, install, checks).
# `make help` lists the others. Everything lives in .venv; a second call finds its stamp and starts at once.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

# The first of these that is Python 3.11 or newer; `make PYTHON=/path/to/python test` chooses another.
suitable = $(shell $(1) -c 'import sys; sys.version_info >= (3, 11) and print("$(1)")' 2>/dev/null)
PYTHON ?= $(firstword $(foreach name,python3 python3.11 python3.12 python3.13,$(call suitable,$(name))))
VENV := .venv
STAMP := $(VENV)/.installed

# `make gpu SYSTEM=1` uses the python3 and the packages at hand and installs nothing.
ifdef SYSTEM
PY := python3
READY :=
export PYTHONPATH := src
else
PY := $(VENV)/bin/python
READY := $(STAMP)
endif

DEMO ?= tools/demo.py
WORKERS ?= 2
PYTEST_ARGS ?=
# Scripts that measure speed, which depends on the device. Those that measure learning are run by name.
BENCHMARKS = $(shell grep -l -e --device $$(grep -l __main__ benchmarks/*.py))

# On Linux PyPI's torch is the CUDA build, with gigabytes of libraries beside it. Without an NVIDIA driver the CPU
# index is asked as well: its 2.x.y+cpu outranks PyPI's 2.x.y. Where that index cannot be reached, pip says so and
# goes on. `make TORCH_INDEX= test` leaves it out.
ifeq ($(shell uname -s)-$(shell command -v nvidia-smi),Linux-)
TORCH_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15
endif

# The repository root must stay off sys.path: its kernels/ would shadow a package of that name.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

PIP := $(VENV)/bin/python -m pip

.PHONY: help install demo test lint format types floors unit bwrap wheel gpu bench constraints clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## make .venv with the tested versions

# torch first, pinned and alone, so that nothing else decides which build comes and only it is looked for in the extra
# index; setuptools with it, to build without a download.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-deps $(TORCH_INDEX) -c constraints.txt torch setuptools
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: $(READY)  ## the main job, offline on two CPU cores: train, compare, print the table
	$(PY) $(DEMO)

test: lint types floors unit wheel  ## every check, as CI runs them

lint: $(READY)  ## ruff: rules and format
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: $(READY)  ## ruff: fix and format
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

types: $(READY)  ## mypy --strict on the package
	$(PY) -m mypy

floors: $(READY)  ## import-linter: no arrow runs from a lower floor to an upper one
	$(VENV)/bin/lint-imports --no-logo

# CI installs bubblewrap, so that the sandbox's upper tier is tested there and not skipped.
bwrap:
ifeq ($(CI)-$(shell id -u)-$(shell command -v bwrap),true-0-)
	apt-get update -qq
	apt-get install -qq --no-install-recommends bubblewrap
endif

unit: $(READY) bwrap  ## pytest, WORKERS=2 processes of one thread; PYTEST_ARGS='-k name' narrows it
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

wheel: $(READY)  ## sdist, the wheel from it, and what a clean environment finds in that
	rm -rf build dist && mkdir build
	$(PY) -m build --no-isolation --outdir dist . > build/log 2>&1 || { cat build/log >&2; exit 1; }
	$(PY) tools/check_wheel.py dist

gpu: $(READY)  ## tests marked gpu, then every benchmark, on a CUDA device
	@$(PY) -c 'import torch; torch.cuda.is_available() or exit("torch sees no CUDA device; nothing was run.")'
	$(PY) -m pytest -q -m gpu $(PYTEST_ARGS)
	for script in $(BENCHMARKS); do echo "== $$script"; $(PY) $$script --device cuda || exit 1; done

bench: $(READY)  ## every benchmark at its default sizes, on the CPU
	for script in $(BENCHMARKS); do echo "== $$script"; $(PY) $$script || exit 1; done

constraints: $(READY)  ## write constraints.txt from what .venv holds
	$(PY) tools/write_constraints.py constraints.txt
	@touch $(STAMP)

clean:  ## remove build outputs and caches; .venv stays
	rm -rf build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
