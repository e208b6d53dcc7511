# Each verb sets up what it needs; a second run starts at once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PATHS := .:kernels:server:clients/python
export PYTHONPATH := $(PATHS)
export MYPYPATH := kernels:server:clients/python

.PHONY: serve test test-quick check docs demo bench rebuild-demo

serve: $(VENV)/local  ## the embedded demo at http://127.0.0.1:8000/v1; CONFIG=file.toml for another
	$(BIN)/python -m infer_align_server serve $(CONFIG)

test: $(VENV)/dev  ## everything
	$(BIN)/python -m pytest

test-quick: $(VENV)/dev  ## what a change should be tried with: under two minutes
	$(BIN)/python -m pytest -m "not slow"

check: $(VENV)/dev  ## style, types, layers, dead code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/python docs/generate.py --check

demo: $(VENV)/dev  ## the table of effects on the embedded demo, and its plot
	$(BIN)/python benchmarks/alignment/best_of_n.py
	$(BIN)/python benchmarks/alignment/vas.py

bench: $(VENV)/dev  ## serving: overhead, throughput, memory, each beside its baseline
	$(BIN)/python benchmarks/serving/run.py
	$(BIN)/python benchmarks/serving/vas.py

docs: $(VENV)/dev  ## fill the tables from the code
	$(BIN)/python docs/generate.py

rebuild-demo: $(VENV)/dev  ## train the embedded models again
	$(BIN)/python -m infer_align.demo.build
	$(BIN)/python -m infer_align.demo.values

$(VENV)/local $(VENV)/dev: $(VENV)/%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[$(if $(filter dev,$*),local$(comma)dev,$*)]' --constraint constraints.txt
	touch $@

comma := ,

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
