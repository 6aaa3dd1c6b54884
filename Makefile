# make test: the environment, the linters, the whole test-suite.  make demo: the environment, then the demonstration.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: venv lint types test demo clean

venv: $(STAMP)

# torch first and by itself, with its exact version: left to the resolver, a range may fetch another build of it.
# An environment that is there is brought up to date as it is: made again over itself by another Python, it breaks.
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("penstock needs Python 3.11 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-input -c constraints.txt setuptools wheel
	$(BIN)/pip install --quiet --no-input -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --no-input -c constraints.txt --no-build-isolation -e '.[test]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On an installed copy, seen from elsewhere: the rooms are top-level folders here, and modules of penstock only there.
# build/ goes first, because setuptools would put files into the copy that were deleted since.
types: $(STAMP)
	rm -rf build
	copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && \
	$(BIN)/pip install --quiet --no-input --no-deps --no-build-isolation --target "$$copy" . && \
	checkout=$$PWD && cd "$$copy" && \
	"$$checkout/$(BIN)/mypy" --strict --config-file "$$checkout/pyproject.toml" --cache-dir "$$checkout/.mypy_cache" \
		-p penstock

# Tests of one file share what they make, and stay in one process.
test: lint types
	$(BIN)/python -m pytest -n logical --maxprocesses=4 --dist loadfile

demo: $(STAMP)
	$(BIN)/penstock demo

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
