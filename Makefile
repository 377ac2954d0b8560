# Everything a contributor does, by name. `make` alone lists the targets.
# No target needs another before it: each builds .venv when it is missing or older than what it is built from.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-system lint docs bench ui local-s3 constraints

PYTHON ?= python3
OUT ?= .demo
DEMO_ARGS ?=
UI_ARGS ?=
S3_DIR ?= .mae/s3

READY := .venv/.ready
PY := .venv/bin/python
# The tools of .venv come first on PATH, for what is started by name.
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## build .venv with the pinned versions
	@echo ".venv is ready: .venv/bin/mae --help"

$(READY): pyproject.toml constraints.txt infra/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is missing or older than 3.11: install a newer one, then 'make setup PYTHON=python3.12'" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv .venv \
	  || { rm -rf .venv; echo "$(PYTHON) cannot make a virtual environment: apt-get install python3-venv" >&2; exit 1; }
	@test -e $@ && echo "bringing .venv up to date" \
	  || echo "installing about 7 GB into .venv: about a minute where the network is quick"
	@$(PY) infra/install.py -e '.[dev]'
	@touch $@

demo: $(READY)  ## the whole pipeline on small real images, results in OUT=.demo (DEMO_ARGS=--quick: shorter)
	@$(RUN) $(PY) -m jobs.demo --out "$(OUT)" $(DEMO_ARGS)

# Two files at a time: many tests wait for processes to start. A file's tests stay together, for the servers they share; the
# longest come first, in the order of their folders.
test: lint  ## lint, then the tests (without the long ones)
	@$(RUN) $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-system: $(READY)  ## the long tests, on real clusters, stores and servers
	@$(RUN) $(PY) -m pytest -m system

lint: $(READY)  ## ruff, mypy, and the import contracts of pyproject.toml
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) mypy
	@$(RUN) lint-imports --no-logo --cache-dir .mypy_cache/import-linter

# Not --quiet: that hides the warnings which --strict counts. NO_MKDOCS_2_WARNING silences the theme's notice about its successor.
docs: $(READY)  ## the documentation site in site/; a broken link fails
	@$(PY) docs/images/architecture.py
	@$(RUN) NO_MKDOCS_2_WARNING=1 mkdocs build --strict
	@echo "site/index.html; with the search: $(PY) -m http.server -d site --bind 127.0.0.1"

bench: $(READY)  ## every benchmark in its quick shape
	@set -e; found=; for file in benchmarks/[a-z]*.py; do \
	  test -e "$$file" || continue; found=yes; name=$$(basename "$$file" .py); \
	  echo "== $$name"; $(RUN) $(PY) -m "benchmarks.$$name" --quick; \
	done; test -n "$$found" || echo "benchmarks/ holds no benchmark yet"

ui: $(READY)  ## MLflow's pages over the local runs (UI_ARGS: see mae ui --help)
	@$(RUN) mae ui $(UI_ARGS)

local-s3: $(READY)  ## a real S3 server on loopback over S3_DIR=.mae/s3; prints what to export, Ctrl-C ends it
	@exec $(PY) -m infra.local.s3 --dir "$(S3_DIR)"

constraints: $(READY)  ## write constraints.txt anew from what .venv holds
	@{ sed -n '/^#/p' constraints.txt; \
	   { $(PY) -m pip freeze --exclude-editable | grep -vE ' @ |^#|^(pip|setuptools|uv|wheel)==' ; \
	     grep '==.*  # ' constraints.txt; } | LC_ALL=C sort -f; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt
	@echo "constraints.txt: $$(grep -c == constraints.txt) versions"
