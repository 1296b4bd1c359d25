# Every target makes .venv on its first run and touches nothing outside the checkout.
#
#   make run         the tour: what a KV cache is and does, measured on the packaged model
#   make test        the test suite, at most 10 minutes on 2 cores
#   make check       formatting, lint, types, layers, at most 2 minutes
#   make test-long   the slow tests, the laws with 5 times the examples and the sweep, within 45 minutes
#   make matrix      docs/matrix.md: which choices compose
#   make sweep       docs/models.md: which models run, and which way
#   make claims      docs/claims.md: headline claims, run; LENGTHS=FILE.csv for those about paging
#   make bench       every benchmark, one JSON document each, under out/bench/
#   make docs        the documentation, under site/
#   make clean       removes what these made, .venv included
#
#   PYTHON=python3.12   the interpreter .venv is made from (3.11 or newer)
#   TORCH=as-found      take whatever torch build the package index offers; see README.md, "Installing torch"

PYTHON ?= python3
TORCH ?= auto
JOBS ?= 2
LIMIT ?= timeout --kill-after=30s 45m
# Fails when fewer model classes run than once did.
SWEEP = $(BIN)/python tools/sweep_models.py --check quire_check:check --jobs $(JOBS) --need-packed 89 --need-all 117

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
KERNELS := $(VENV)/.kernels
INSTALLED_DOCS := $(VENV)/.installed-docs

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install run test check test-long test-slow sweep-only matrix sweep claims bench docs clean

help:
	@sed -n 's/^#   //p' Makefile

install: $(INSTALLED)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Quire needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# Before the real installation, .ci/torch looks at which torch the index would give: on a machine without an NVIDIA GPU it
# takes the CPU build instead of gigabytes of CUDA libraries, or stops and says so.
$(INSTALLED): pyproject.toml constraints.txt .ci/torch | $(VENV)/bin/python
	@TORCH=$(TORCH) .ci/torch $(BIN)/python constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The installation compiles the CPU kernels; this does it anew when their sources change. Without a compiler it goes on.
$(KERNELS): $(wildcard src/quire/kernels/cpu/*.[ch]pp) src/quire/kernels/cpu/quire_cpu.h src/quire/kernels/build.py $(INSTALLED)
	@$(BIN)/python -m quire.kernels.build >/dev/null || true
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

run: $(KERNELS)
	@$(BIN)/quire tour

test: $(KERNELS)
	$(BIN)/python -m pytest -n $(JOBS) --hypothesis-profile=ci -m "not slow and not gpu" --durations=10

# Every step runs even when an earlier one failed, so that one call shows everything.
check: $(INSTALLED)
	@failed=; for step in "ruff format --check --output-format concise ." "ruff check --output-format concise ." \
	    "lint-imports --no-logo" mypy; do \
	    echo "== $$step"; $(BIN)/$$step || failed="$$failed $${step%% *}"; \
	done; \
	[ -z "$$failed" ] || { echo "make check: failed:$$failed" >&2; exit 1; }

test-long: $(INSTALLED)
	$(LIMIT) $(MAKE) --no-print-directory --keep-going test-slow sweep-only

test-slow: $(KERNELS)
	$(BIN)/python -m pytest -n $(JOBS) --hypothesis-profile=long -m "(slow or law) and not gpu"

sweep-only: $(KERNELS)
	@mkdir -p out
	$(SWEEP) --out out/models.md

matrix: $(KERNELS)
	$(BIN)/python tools/matrix.py --write docs/matrix.md

sweep: $(KERNELS)
	$(SWEEP)

claims: $(KERNELS)
	$(BIN)/quire claims --write docs/claims.md $(if $(LENGTHS),--lengths $(LENGTHS))

bench: $(KERNELS)
	@mkdir -p out/bench
	@set -e; for file in $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py)); do \
	    name=$$(basename $$file .py); echo "== $$name"; \
	    $(BIN)/python $$file --json > out/bench/$$name.json; \
	done

docs: $(INSTALLED_DOCS)
	$(BIN)/python tools/catalogue.py --write docs/codecs.md
	$(BIN)/python tools/catalogue.py --policies docs/retention.md
	$(BIN)/python tools/methods.py --write docs/methods.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site build dist out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f src/quire/kernels/cpu/libquire_cpu.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
