# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: install demo parity wires benchmark lint types check test clean

install: $(STAMP)

# Everything, at the versions of .ci/constraints.txt; run again only when what is to be installed changes.
$(STAMP): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint .ci/constraints.txt --editable ".[recipes,dev]"
	@touch $@

demo: install
	$(RUN) -m recipes.demo

parity: install
	$(RUN) -m recipes.demo --parity

wires: install
	$(RUN) -m recipes.demo --wires

# Needs root, Linux, ip and tc; under 10 minutes.
benchmark: install
	$(RUN) -m benchmarks.step_time --short

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install
	$(VENV)/bin/mypy

# The part to run while working: under two minutes.
check: lint types
	$(RUN) -m pytest -q -m "not slow"

test: lint types
	$(RUN) -m pytest -q --durations=15

clean:
	rm -rf $(VENV) outputs multirun lightning_logs
