# Two commands, nothing before them: `make demo` and `make test`. Each makes .venv itself.
# Needs python3 (3.11 or newer) with pip, and make. Where packages come from is pip's own configuration.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# More arguments for pytest or the demo: `make test ARGS="tests/unit -x"`, `make demo ARGS=--keep`.
ARGS ?=

# Tests and demos start hundreds of Python processes: raypg is compiled once, and not in each of them.
export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-system faults lint format bench screenshots clean system-packages

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv and install raypg with all it needs (quick when that is done)

# Only pyproject.toml says what to install; the sources are used where they lie (-e).
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "raypg needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 …" >&2; exit 1; }
	@if [ ! -x $(VENV)/bin/pip ]; then \
		echo "== making $(VENV) with $$($(PYTHON) --version)"; \
		if $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null; then \
			$(PYTHON) -m venv --clear $(VENV); \
		elif $(PYTHON) -c 'import venv, pip' 2>/dev/null; then \
			$(PYTHON) -m venv --clear --without-pip $(VENV) && \
			$(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip; \
		else \
			echo "$(PYTHON) can make no virtual environment: it has neither ensurepip nor pip." >&2; \
			echo "Install them first (Debian, Ubuntu: apt-get install python3-venv python3-pip)." >&2; \
			exit 1; \
		fi; \
	fi
	@echo "== installing raypg, Ray, PostgreSQL 18 and the test tools into $(VENV) (a few minutes the first time)"
	@start=$$SECONDS; PYTHONWARNINGS=ignore $(VENV)/bin/pip install --quiet --disable-pip-version-check --use-pep517 -e '.[test]' && \
		echo "== installed in $$((SECONDS - start)) s"
	@touch $@

demo: setup ## Load 336,776 real flights through a pool on a local Ray cluster, and query them
	$(VENV)/bin/raypg demo $(ARGS)

system-packages: ## What some tests need of the system: PostgreSQL with TLS and contrib, PgBouncer, Prometheus, Chromium (root, apt)
	@bash tests/system-packages.sh

test: setup system-packages ## Run all tests on real PostgreSQL and real Ray
ifeq ($(strip $(ARGS)),)
	$(VENV)/bin/python -P tests/everything.py
else
	$(VENV)/bin/pytest -q --durations=15 $(ARGS)
endif

# What depends on the server most: sessions, leases, transactions, statements after DDL, and its death.
ON_SYSTEM := $(addprefix tests/integration/test_,$(addsuffix .py,leases transactions session_state settings cursors \
	prepared schema_changes pool pipeline_rows write write_types)) $(addprefix tests/faults/test_,$(addsuffix .py, \
	lease_owner cancellation breaker_outages))

test-system: setup system-packages ## Run the tests that depend on the server most on the system's PostgreSQL
ifeq ($(strip $(ARGS)),)
	RAYPG_TEST_POSTGRES=system $(VENV)/bin/python -P tests/everything.py $(ON_SYSTEM)
else
	RAYPG_TEST_POSTGRES=system $(VENV)/bin/pytest -q --durations=5 $(ON_SYSTEM) $(ARGS)
endif

faults: setup ## Kill workers, jobs and PostgreSQL under writes, by twenty schedules of two million rows (long)
	RAYPG_FAULT_SCHEDULES=20 $(VENV)/bin/pytest -q tests/faults/test_write_faults.py $(ARGS)

lint: setup ## Check format, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: setup ## Bring the sources into the common format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: setup ## Run the benchmarks
	@PYTHONWARNINGS=ignore $(VENV)/bin/pip install --quiet --disable-pip-version-check --use-pep517 -e '.[bench]'
	@shopt -s nullglob; files=(benchmarks/bench_*.py); \
	if [ $${#files[@]} -eq 0 ]; then echo "benchmarks/ holds no bench_*.py"; exit 1; fi; \
	for file in "$${files[@]}"; do echo "== $$file"; $(VENV)/bin/python "$$file" $(ARGS) || exit 1; done

screenshots: setup system-packages ## Take the pictures of the dashboard in docs/ anew, of a real pool under load
	PYTHONPATH=tests $(VENV)/bin/python tests/browser/screenshots.py

clean: ## Delete all that make made: .venv, builds, caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
