.DEFAULT_GOAL := help
SHELL := bash
PY := .venv/bin/python
UV := build/lock/bin/uv
# Files of tests go to two processes, which have about two cores' work; to one where they would have to share a GPU.
WORKERS ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 0 || echo 2)
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test test-unit check format lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-10s %s\n", $$1, $$2 }'

install: .venv/installed ## Make .venv from the lock file (GPU build where there is a GPU; DEVICE=cpu|gpu decides otherwise)

.venv/installed: requirements/cpu.lock requirements/gpu.lock pyproject.toml tools/install.sh
	@DEVICE="$(DEVICE)" PYTHON="$(PYTHON)" tools/install.sh

demo: install ## Distil a small model, from nothing to a report
	@$(PY) experiments/quickstart.py

test: install ## All tests, in two processes (WORKERS=0: in one)
	@$(PYTEST)

test-unit: install ## The tests that start neither Ray nor vLLM nor DeepSpeed, in a few minutes
	@$(PYTEST) -m "not stack"

check: install ## Format, lint, types: changes nothing
	@$(PY) -m ruff format --check . && $(PY) -m ruff check . && $(PY) -m pyright

format: install ## Format and sort the imports
	@$(PY) -m ruff check --select I --fix . && $(PY) -m ruff format .

lock: $(UV) ## Resolve pyproject.toml anew into both lock files; look at the difference before you commit it
	@$(call resolve,cpu,--overrides requirements/cpu-overrides.txt)
	@$(call resolve,gpu,)

# The header, then the resolution for Python 3.11; checked to be that for 3.12, too.
resolve = set -euo pipefail; \
	uv="$(UV) pip compile -q pyproject.toml --extra $(1) --extra dev $(2) --no-header --annotation-style line --python-platform x86_64-manylinux_2_28"; \
	{ cat requirements/header.txt; $$uv --python-version 3.11; } > build/lock/$(1).lock; \
	$$uv --python-version 3.12 --constraints build/lock/$(1).lock | cut -d' ' -f1 | diff <(grep == build/lock/$(1).lock | cut -d' ' -f1) -; \
	mv build/lock/$(1).lock requirements/$(1).lock

$(UV):
	@python3 -m venv build/lock && build/lock/bin/python -m pip install -qq uv

clean: ## Remove everything that was built, the environment included
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
