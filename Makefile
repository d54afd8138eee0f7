# make demo   set up .venv, then prune, export, verify and bundle the embedded model
# make test   set up .venv, then run the tests
# make lint   set up .venv, then ruff and mypy
# make docs   set up .venv, then write the documents as a site into site/
# make check  lint, then the tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= build/tiny-reasoner-bundle

.PHONY: demo test test-slow lint docs check clean

demo: $(VENV)/.base
	@echo "== building a bundle from the embedded tiny-reasoner into $(OUT)"
	$(BIN)/racdeploy build tiny-reasoner --target gguf --out $(OUT)
	@echo "== try it:  $(BIN)/racdeploy run $(OUT) 'What is 12 times 34?' --show-thinking"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n logical --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check racdeploy tests examples benchmarks action docs
	$(BIN)/ruff format --check racdeploy tests examples benchmarks action docs
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs build --strict

check: lint test

clean:
	rm -rf $(VENV) build dist site

$(VENV)/.python:
	@echo "== creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "racdeploy needs Python 3.11 or newer: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.base: $(VENV)/.python pyproject.toml
	@echo "== installing racdeploy with torch, transformers, gguf and llama-cpp-python (compiles for minutes the first time)"
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "== installing the test tools"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
