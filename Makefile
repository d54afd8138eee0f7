# make demo   set up .venv, then prune, export, verify and bundle the embedded model
# make test   set up .venv, then run the tests; build/junit-test.xml keeps the time of each
# make test-docs   documents, site, pictures, examples, wheels, users' type checkers and workflows
# make test-more   what guards one rare thing, and every family and number format where `make test` takes one of each
# make test-more-changed   those of its files that the branch's changes reach by imports
# make test-portable   a sample of the tests with torch's portable and with its AVX2 kernels
# make test-kernels   compile and install ./kernels into .venv, then run its tests, emulated and slow ones too
# make test-optimum   set up .venv-optimum, with transformers 4.57, then run what optimum and it may change
# make test-optimum-slow   set up .venv-optimum, then export every family with optimum, and open such files with it
# make lint   set up .venv, then ruff and mypy
# make fuzz   set up .venv with atheris (Linux), then fuzz each reader for SECONDS, 60 by default
# make fuzz-changed   fuzz only the readers that the branch has changed
# make docs   set up .venv, then write the documents as a site into site/
# make check  lint, then the tests
# test, lint and docs install what requirements/locked.txt holds, hash by hash, where its archives fit the machine;
# `make LOCK= test` installs by the ranges of pyproject.toml, as a user's pip does
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SECONDS ?= 60
OUT    ?= build/tiny-reasoner-bundle
LOCK   ?= requirements/locked.txt
VENV_OPTIMUM  := .venv-optimum
TESTS_OPTIMUM ?= $(addprefix tests/,contracts engines end_to_end exporting pruning recovery)

TESTS_DOCS := documents examples packaging
# Where a processor's own sums could decide: exported files, chosen codes, engines, a cut and a whole build.
TESTS_PORTABLE := $(addprefix tests/,pipeline/test_gates.py pruning/test_rounding.py contracts/test_engines.py \
    end_to_end/test_cut.py end_to_end/test_build.py)
MORE := more and not slow and not emulated
KERNELS ?= slow or not slow
# Once collected, tests write no bytecode (tests/conftest.py): it is there before the thousands of processes that they
# start.
COMPILE = $(BIN)/python -m compileall -q -f racdeploy tests benchmarks
# A file stays with one worker, so that what its tests share is built once; the longest come first (tests/conftest.py).
PYTEST = $(COMPILE) && $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder --durations 40 --junitxml build/junit-$@.xml

.PHONY: demo test test-docs test-more test-more-changed test-portable test-kernels test-slow test-optimum test-optimum-slow fuzz fuzz-changed lint docs check clean

demo: $(VENV)/.base
	@echo "== building a bundle from the embedded tiny-reasoner into $(OUT)"
	$(BIN)/racdeploy build tiny-reasoner --target gguf --out $(OUT)
	@echo "== try it:  $(BIN)/racdeploy run $(OUT) 'What is 12 times 34?' --show-thinking"

test: $(VENV)/.dev
	$(PYTEST) $(addprefix --ignore tests/,$(TESTS_DOCS))

test-docs: $(VENV)/.dev
	$(PYTEST) $(addprefix tests/,$(TESTS_DOCS))

test-more: $(VENV)/.dev
	$(PYTEST) -m '$(MORE)'

# pytest ends with 5 where it runs no test: of the files that are reached, all may be slow.
test-more-changed: $(VENV)/.dev
	@files="$$($(BIN)/python -m tests.support.reached)"; \
	if [ -n "$$files" ]; then $(PYTEST) -m '$(MORE)' $$files || [ $$? = 5 ]; else echo "no test of test-more is reached"; fi

test-portable: $(VENV)/.dev
	export ATEN_CPU_CAPABILITY=default; $(PYTEST) $(TESTS_PORTABLE)
	export ATEN_CPU_CAPABILITY=avx2; $(PYTEST) $(TESTS_PORTABLE)

test-kernels: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-deps ./kernels
	$(PYTEST) -m '$(KERNELS)' kernels/tests

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

test-optimum: $(VENV_OPTIMUM)/.test
	$(VENV_OPTIMUM)/bin/python -m pip check
	$(VENV_OPTIMUM)/bin/python -m pytest -n logical --dist loadfile --junitxml build/junit-$@.xml $(TESTS_OPTIMUM)

test-optimum-slow: $(VENV_OPTIMUM)/.test
	$(VENV_OPTIMUM)/bin/python -m pytest -m slow -k optimum tests/exporting tests/clients

fuzz: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

fuzz-changed: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz --changed --seconds $(SECONDS)

lint: $(VENV)/.dev
	$(BIN)/ruff check racdeploy tests examples benchmarks action docs kernels
	$(BIN)/ruff format --check racdeploy tests examples benchmarks action docs kernels
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs build --strict

check: lint test

clean:
	rm -rf $(VENV) $(VENV_OPTIMUM) build dist site

$(VENV)/.python:
	@echo "== creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "racdeploy needs Python 3.11 or newer: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(LOCK),--require-hashes --requirement requirements/pip.txt,--upgrade pip)
	@touch $@

$(VENV)/.base: $(VENV)/.python pyproject.toml
	@echo "== installing racdeploy with torch, transformers, gguf and llama-cpp-python (compiles for minutes the first time)"
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	@touch $@

# torch alone has no hash in the lock, so that each machine takes its own build: it comes last, by its range.
$(VENV)/.dev: $(VENV)/.python pyproject.toml $(LOCK)
	@echo "== installing racdeploy, all its extras and the test tools (llama-cpp-python compiles for minutes the first time)"
	@set -e; \
	if [ -n "$(LOCK)" ] && $(BIN)/python tests/support/lock.py fits; then \
	    $(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement $(LOCK); \
	    $(BIN)/python tests/support/lock.py versions > $(VENV)/locked-versions.txt; \
	    $(BIN)/python -m pip install --quiet --constraint $(VENV)/locked-versions.txt --no-build-isolation --editable '.[dev]'; \
	else \
	    $(BIN)/python -m pip install --quiet --editable '.[dev]'; \
	fi
	@touch $(VENV)/.base $@

$(VENV_OPTIMUM)/.test: pyproject.toml
	@echo "== installing racdeploy with optimum, transformers 4.57 and the test tools into $(VENV_OPTIMUM)"
	$(PYTHON) -m venv $(VENV_OPTIMUM)
	$(VENV_OPTIMUM)/bin/python -m pip install --quiet --upgrade pip
	$(VENV_OPTIMUM)/bin/python -m pip install --quiet --editable '.[test,optimum]'
	@touch $@
