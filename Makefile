# make demo     the whole job on sections made for it, in demo/ (minutes)
# make test     the tests
# make lint     ruff and pyright
# make docs     the pages of docs/, in docs/_build/html
# make install  only the virtual environment
# All of them make .venv first where it is not there or its requirements changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What takes longer is left to CI: make test PYTEST_ARGS= runs all.
PYTEST_ARGS ?= -m "not slow"
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools

.PHONY: demo test lint docs install clean

demo: $(INSTALLED)
	$(BIN)/python -m metroem demo --folder demo

test: $(TOOLS)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(TOOLS)
	$(BIN)/python -m sphinx -W -n -b html docs docs/_build/html

install: $(INSTALLED)

$(INSTALLED): requirements.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps -e .
	touch $@

$(TOOLS): requirements-dev.txt $(INSTALLED)
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) demo docs/_build build dist *.egg-info
