# make demo     the whole job on sections made for it, in demo/ (minutes)
# make test     the tests
# make lint     ruff and pyright
# make audit    ask whether what is installed has known holes
# make docs     the pages of docs/, in docs/_build/html
# make install  only the virtual environment
# make clients  .venv-corgie, with corgie, which applies the modules
# All of them make .venv first if it is missing or its requirements changed; the last
# makes its own alone. From the public index torch brings CUDA. Without a GPU:
#     make install REQUIREMENTS=requirements-cpu.txt

PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements.txt
BIN := $(VENV)/bin
# What takes longer is left to CI; make test PYTEST_ARGS= runs all, -m long what CI
# leaves out.
PYTEST_ARGS ?= -m "not slow"
# Three files of tests at a time, one thread each, since some wait for others; in their
# order, since files of few tests are the longest and would come last.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadgroup \
    --no-loadscope-reorder
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools
CLIENTS := $(VENV)-corgie
CORGIE := $(CLIENTS)/.installed

.PHONY: demo test lint audit docs install clients clean

demo: $(INSTALLED)
	$(BIN)/python -m metroem demo --folder demo

test: $(TOOLS)
	$(PYTEST) $(PYTEST_ARGS)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

audit: $(TOOLS)
	$(BIN)/python .ci/audit.py

docs: $(TOOLS)
	$(BIN)/python -m sphinx -W -n -b html docs docs/_build/html

install: $(INSTALLED)

$(INSTALLED): requirements.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r $(REQUIREMENTS)
	$(BIN)/python -m pip install --no-deps -e .
	touch $@

# A CUDA build of torch brings its own triton.
$(TOOLS): requirements-dev.txt requirements-cpu-tests.txt $(INSTALLED)
	$(BIN)/python -m pip install -r requirements-dev.txt
	if $(BIN)/python -m pip show torch | grep '^Version:.*+cpu' >/dev/null; then \
	    $(BIN)/python -m pip install -r requirements-cpu-tests.txt; fi
	touch $@

clients: $(CORGIE)

# corgie has old pins of its own, so it gets an environment of its own. Version 0.1.1
# takes --tgt_z_offset for text and then adds it to a number.
$(CORGIE): requirements-clients.txt requirements.txt setup.py
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -r requirements-clients.txt
	$(CLIENTS)/bin/python -m pip install --no-deps -e .
	sed -i.orig '/"--tgt_z_offset"/s/type=str/type=int/' \
	    $(CLIENTS)/lib/python3*/site-packages/corgie/cli/compute_field.py
	touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) demo docs/_build build dist *.egg-info
