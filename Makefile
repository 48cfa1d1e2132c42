# `make demo` and `make test` do all their own set-up on a fresh machine: Python 3.11 or later and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check lint types docs figures clean

demo: $(INSTALLED)
	$(BIN)/python -m benchmarks.demo demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: lint types test

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

# The figures of benchmarks/results/; DATA is a folder that holds mvtec_bottle and magnetic_tile.
figures: $(INSTALLED)
	$(BIN)/python -m benchmarks.main_job --data $(DATA) --out benchmarks/results
	$(BIN)/python -m benchmarks.gallery --data $(DATA) --out benchmarks/results --recipes exact ivf compact location history
	$(BIN)/python -m benchmarks.durability --out benchmarks/results
	$(BIN)/python -m benchmarks.calibration --data $(DATA) --out benchmarks/results

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build dist
