# The same words for a person and for CI. Each target does the set-up that it needs.
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: setup demo test lint ui bench clean
.DEFAULT_GOAL := setup

setup: $(INSTALLED)  ## virtual environment with the exact versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@python="$(PYTHON)"; \
	for candidate in python3.11 python3.12 python3.13 python3; do \
	    [ -n "$$python" ] && break; \
	    $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	        && python=$$candidate; \
	done; \
	[ -n "$$python" ] || { echo "make: no Python 3.11 to 3.13 found; install one, or say make PYTHON=..."; exit 1; }; \
	$$python -c 'import ensurepip, venv' 2>/dev/null \
	    || { echo "make: $$python has no venv; on Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }; \
	[ -x $(BIN)/python ] || $$python -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## train, sweep and compare on 5,000 real digits
	$(BIN)/ds-lightning demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

ui: $(INSTALLED)
	$(BIN)/ds-lightning ui

bench: $(INSTALLED)  ## the benchmarks that need no arguments; each prints JSON (argparse ends with 2 for the others)
	@for script in $$(grep -l __main__ benchmarks/*.py); do \
	    echo "== $$script"; $(BIN)/python $$script; code=$$?; [ $$code -eq 0 ] || [ $$code -eq 2 ] || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
