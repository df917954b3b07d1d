# Every target sets up .venv by itself on its first call and reuses it afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# DeepSpeed's CUDA ops are not used: the kernels are Triton, compiled at first use.
export DS_BUILD_OPS := 0
export TOKENIZERS_PARALLELISM := false

# `make test COVERAGE=1`, as continuous integration has it: the tests fail too if they leave much out.
MEASURED := $(if $(COVERAGE),--cov --cov-report=term:skip-covered --cov-fail-under=90)

.PHONY: install demo test test-slow test-gpu test-multigpu check style coverage bench bench-cpu tune clean

install: $(STAMP)

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel ninja numpy
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

demo: ## set-up, then the main job on the embedded corpus
	@scripts/demo.sh

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not multigpu and not slow and not network" $(MEASURED)

coverage: ## the tests, with what they run of neox_hf measured: about twice as long
	$(MAKE) test COVERAGE=1

test-slow: install
	$(BIN)/python -m pytest -m "slow"

test-gpu: install ## on a machine with a CUDA device
	$(BIN)/python -m pytest -m "gpu"

test-multigpu: install ## on a host with two
	$(BIN)/python -m pytest -m "multigpu"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## on a machine with a CUDA device; docs/measurements/README.md
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[bench,hopper]"
	$(BIN)/python -m scripts.bench

CONFIG ?= recipes/pythia_1.4b.yaml
tune: install ## on a machine with a CUDA device; docs/kernels.md, "Launches"
	$(BIN)/python -m neox_hf.tune --config $(CONFIG)

bench-cpu: install
	$(BIN)/python scripts/bench_trainer.py --config recipes/demo.yaml --against bare
	$(BIN)/python scripts/bench_tokenization.py

clean:
	rm -rf $(VENV) runs build *.egg-info
