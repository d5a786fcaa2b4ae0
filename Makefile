# The recipes of the house; .ci/run calls the same ones. Each makes `.venv` itself if need be.
# Paths are relative, so a checkout may lie under a path with spaces in it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# For two cores: many tests wait for disks and clocks, and with two at a time a third is idle.
JOBS ?= 3
ARGS ?=
STAMP := .venv/ready-$(shell { pwd -P; cat pyproject.toml constraints.txt .ci/venv; } | cksum | cut -d ' ' -f 1)
PYTEST := .venv/bin/python -m pytest

.PHONY: help venv check test cover heavy demo bench clean

help: ## Say what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'ARGS="..." is passed on: make test ARGS="tests/unit/core -x". PYTHON=... picks the Python.'

venv: $(STAMP) ## Make .venv, with everything that development needs (a second time: nothing)

$(STAMP):
	@.ci/venv '$@'

check: $(STAMP) ## Lint, format, types, layers, and the rules of the house
	.venv/bin/python -m ruff check --output-format=concise .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	.venv/bin/lint-imports --no-logo
	$(PYTEST) -q tests/test_tidy.py tests/test_layers.py

test: $(STAMP) ## All tests but the heavy ones (JOBS=3); without ARGS the core's coverage, too
	$(PYTEST) -n $(JOBS) --dist loadgroup $(ARGS)
	$(if $(ARGS),,$(MAKE) --no-print-directory cover)

# By its own tests alone: traced, a search of the models takes four times as long.
cover: $(STAMP) ## How much of the core its own tests run: all of it, each branch
	$(PYTEST) -q -n $(JOBS) --cov --cov-report=term-missing:skip-covered $(addprefix tests/, \
		unit/core property/test_lattice_laws.py property/test_wide_laws.py \
		property/test_invariants.py property/test_protocol.py::test_storms_reach_what_they_must)

heavy: $(STAMP) ## The long tests, one after the other: kill storms and the like
	HYPOTHESIS_PROFILE=heavy $(PYTEST) -m heavy -s $(ARGS)

demo: $(STAMP) ## Train, kill, resume, compare, in under four minutes
	.venv/bin/handfast demo $(ARGS)

bench: $(STAMP) ## What checkpoints cost, beside the hardware and the usual ways; minutes, goal by goal
	.venv/bin/python -m benchmarks --mib 256 --small 1023 --repeat 3 $(ARGS)

clean: ## Remove everything that make made, .venv included
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage* \
		build dist
	find src tests benchmarks .ci -name __pycache__ -type d -prune -exec rm -rf {} +
