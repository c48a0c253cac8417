# Every target sets itself up: a machine with Python >= 3.11 and make is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test test-min lint types check clean
help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

# constraints.txt pins every version, so that today's environment is tomorrow's too.
$(VENV)/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf_sage needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11 ...")'
	@echo "Setting up $(VENV): a few minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

setup: $(VENV)/.done ## make .venv with the pinned versions

demo: setup ## train ERM, SAM and SAGE on real images, about 5 minutes on 2 cores
	@$(BIN)/hf-sage demo

test: setup ## run the test suite
	@$(BIN)/python -m pytest -n 2 --dist loadfile -q

# The oldest versions that pyproject.toml allows; the oldest torch comes with CUDA, several gigabytes.
$(VENV)-min/.done: pyproject.toml .ci/constraints-min.txt
	@$(PYTHON) -m venv $(VENV)-min
	@$(VENV)-min/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints-min.txt \
		--editable ".[demo]" "pytest>=8.0" "pytest-xdist>=3.5"
	@touch $@

test-min: $(VENV)-min/.done ## run the test suite against the lower bounds
	@$(VENV)-min/bin/python -m pytest -n 2 --dist loadfile -q

lint: setup ## check style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup ## check types
	@$(BIN)/mypy

check: test lint types ## everything CI runs

clean: ## remove what was made
	rm -rf $(VENV) $(VENV)-min demo outputs .pytest_cache .mypy_cache .ruff_cache *.egg-info
