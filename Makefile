# The front door: `make demo` runs the main job, `make test` the tests. Both set up first.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
SOURCES := aihwkit_lora callbacks recipes tests benchmarks
DEMO := runs/demo
# Small tensors gain nothing from threads; test processes share the cores instead.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-all lint typecheck bench seeds clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

# aihwkit 1.2.0 has wheels for Python 3.12 and 3.13 only.
$(PYTHON):
	@for python in python3.12 python3.13 python3 python; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 12), (3, 13)))' \
	        2>/dev/null; then \
	        echo "environment in $(VENV) with $$($$python --version)"; \
	        exec $$python -m venv $(VENV); \
	    fi; \
	done; \
	echo "error: expected Python 3.12 or 3.13, found neither. Install one, for example with" \
	    "'uv python install 3.12' or 'pyenv install 3.12', and run make again." >&2; exit 1

# uv is quicker, but pip alone works as well. Where the exact set cannot be had, say because a site
# caps a version, the ranges of pyproject.toml decide.
$(READY): pyproject.toml constraints.txt | $(PYTHON)
	@$(PYTHON) -m uv --version >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet uv || true
	@if $(PYTHON) -m uv --version >/dev/null 2>&1; then \
	    install="$(PYTHON) -m uv pip install --python $(PYTHON)"; \
	else \
	    install="$(PYTHON) -m pip install"; \
	fi; \
	$$install --quiet -c constraints.txt -e '.[dev]' || { \
	    echo "constraints.txt does not fit here; taking what pyproject.toml allows"; \
	    $$install --quiet -e '.[dev]'; \
	}
	@touch $@

setup: $(READY)  ## Make the environment

demo: $(READY)  ## Learn, program, freeze, forget, continue: the whole thing, on bundled data
	$(VENV)/bin/aihwkit-lora run face_recognition --out $(DEMO)

test: lint typecheck  ## Everything that must pass, without slow cases
	$(PYTHON) -m pytest -q -n 2 -m "not slow"

test-all: lint typecheck  ## Everything
	$(PYTHON) -m pytest -q -n 2

lint: $(READY)
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)

# The installed package is checked, since only there callbacks and recipes are sub-packages.
typecheck: $(READY)
	@rm -rf build/typecheck build/lib build/bdist.*
	@$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --target build/typecheck .
	@cd build/typecheck && ../../$(PYTHON) -m mypy --config-file ../../pyproject.toml aihwkit_lora

bench: $(READY)  ## Speed and memory, as ratios measured side by side
	$(PYTHON) benchmarks/programming.py
	$(PYTHON) benchmarks/blocked_tiles.py
	$(PYTHON) benchmarks/step.py
	$(PYTHON) benchmarks/metering.py

seeds: $(READY)  ## Olivetti faces, leaky reference split, three seeds: mean and worst
	$(PYTHON) benchmarks/face_seeds.py

clean:  ## Remove what was built, not the environment
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
