# The two commands are `make book` and `make test`; README.md has what stands
# beneath them, for systems without make.
PYTHON ?= python3
BIN := .venv/bin

# One thread a process: the tests' two workers share the cores.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help book test notebooks experiments lab format clean
.DELETE_ON_ERROR:

help:  ## say what there is to make
	@grep -E '^[a-z]+:.*##' $(firstword $(MAKEFILE_LIST)) \
	  | sed -E 's/:[^#]*##/\t/' | awk -F '\t' '{printf "make %-11s %s\n", $$1, $$2}'

book: .venv/installed  ## set up, run every notebook, build _build/html
	@$(BIN)/python book/_tools/build.py

test: book  ## set up, build, then test everything
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	  $(BIN)/playwright install chromium 2>/dev/null || true
	$(BIN)/python -m pytest --nbval tests book -n 2 --dist loadfile

notebooks: .venv/installed  ## for authors: run notebooks in place (ONLY="a.ipynb b.ipynb")
	@$(BIN)/python book/_tools/notebooks.py $(ONLY)

experiments: .venv/installed  ## for authors: train anew where the code has changed (minutes)
	@$(BIN)/python -m companion.experiments $(ONLY)

lab: .venv/installed  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=book

format: .venv/installed  ## for authors: format and lint the code
	$(BIN)/ruff format companion tests book/_tools book/_extensions
	$(BIN)/ruff check companion tests book/_tools book/_extensions

clean:  ## remove what was built and installed
	rm -rf _build .venv *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What is missing is said in one line, with the remedy.
.venv/installed: requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: there is no $(PYTHON); install Python 3.11 or later, or name yours: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), the book needs Python 3.11 or later; install one and name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "make: $(PYTHON) has no venv module; install it (Debian and Ubuntu: sudo apt install python3-venv)" >&2; exit 1; }
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  $(PYTHON) -m venv --clear .venv
	@echo "Installing into .venv (once; some minutes)"
	@$(BIN)/python -m pip install --quiet -r requirements.txt || { \
	  echo "make: pip could not install requirements.txt (its reason stands above); when that is mended, say make again" >&2; exit 1; }
	@touch $@
