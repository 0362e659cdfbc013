# Two commands on a fresh machine (Python 3.11+, pip): `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/demo
RUN := $(VENV)/bin/python

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed
	$(RUN) -m cast_jax.main --config configs/demo.py:cast --workdir $(WORKDIR)

test: $(VENV)/.installed-dev
	$(RUN) -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
