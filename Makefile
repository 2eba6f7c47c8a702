# Everything a clone needs: `make demo` and `make test` set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYTHONWARNINGS =

.PHONY: demo test soak fuzz oracles lint bench bench-pack clean

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Weighbridge needs Python 3.10 or later; this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@

# Convert what the real msModelSlim wrote to AutoAWQ and AutoGPTQ folders, prove both, print a table.
demo: $(VENV)/.core
	@$(BIN)/python scripts/demo.py

test: $(VENV)/.test
	$(BIN)/python -m pytest

# Coverage-guided fuzzing of what reads a stranger's bytes; longer: make fuzz SECONDS=36000.
SECONDS ?= 3600
fuzz: $(VENV)/.core
	$(BIN)/pip install --quiet --editable '.[fuzz]'
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS)

# Random plans on random checkpoints, killed now and then; each result is read by plain code that shares nothing with ours.
# ROUNDS=20 makes fewer, SEED=7 repeats them; without SEED they are new ones, and the seed is printed.
soak: $(VENV)/.core
	$(BIN)/python scripts/soak.py --rounds $(or $(ROUNDS),200) $(if $(SEED),--seed $(SEED))

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The real tools, each in its own environment outside this folder, judge what Weighbridge writes.
oracles: $(VENV)/.test
	$(BIN)/nox --sessions autoawq autogptq gptqmodel msmodelslim compressed_tensors lmdeploy mindspore mindformers vllm vllm_ascend torch quantize

bench: $(VENV)/.core
	cd scripts && ../$(BIN)/python bench.py --hub --plan

# Packing against the real tools: needs the environments that `make oracles` leaves.
bench-pack: $(VENV)/.test
	$(BIN)/python scripts/bench_pack.py

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
