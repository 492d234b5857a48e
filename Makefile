# make demo      quantize DeiT-S on the demo photographs, from nothing: environment, install, run
# make test      all tests that need no GPU            make test-gpu   those that do
# make test-sanitizer   the CUDA kernels under compute-sanitizer: memcheck, racecheck
# make cuda      compile the CUDA library (needs nvcc, no GPU; VITQ_CUDA_ARCHS=90a compiles for one chip only)
# make clean     remove the environment and what was built or written
#
# PYTHON=python3.12   the interpreter the environment is made from
# VENV=path           where the environment is (an existing one is used as it is)
# PIP_ARGS=...        for pip install, for instance --extra-index-url https://download.pytorch.org/whl/cpu
# TEST_ARGS=...       for pytest, for instance "-k recipe -x"

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
TEST_ARGS ?=
BIN = $(VENV)/bin
STAMP = $(VENV)/.vitq-installed

# Two processes of one thread each: 247 s on 2 cores, where one process with two threads took 489 s. Threads that wait
# without spinning leave the cores to whoever has work.
WORKERS ?= 2
TEST_ENV = OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1

.PHONY: all venv install cuda demo test test-gpu test-sanitizer clean

all: install

venv: $(BIN)/python

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

install: $(STAMP)

# An editable install: Python files and recipes are read from here; it is made again when what is compiled or required changes.
$(STAMP): pyproject.toml setup.py vitq/cpu/build.py $(wildcard vitq/cpu/csrc/*) | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[test,demo,glyphs]'
	touch $@

# The headers alone: what else the package depends on, building does not need.
cuda: install
	test -n "$$VITQ_CUTLASS_DIR" || $(BIN)/python -m pip install $(PIP_ARGS) --no-deps nvidia-cutlass==4.2.0.0
	$(BIN)/python -m vitq.cuda.build

demo: install
	$(BIN)/python tools/quantize_vit.py --model deit_s --weights demo --data demo

test: install
	$(TEST_ENV) $(BIN)/python -m pytest -m 'not gpu' -n $(WORKERS) --dist loadgroup $(TEST_ARGS)

test-gpu: install
	$(BIN)/python -m pytest -m gpu $(TEST_ARGS)

# racecheck watches every access to shared memory, so it takes some of each kernel's cases. memcheck sees an access beyond a tensor only
# where each has an allocation of its own.
test-sanitizer: install
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 $(BIN)/python -m pytest -q -m gpu tests/cuda/test_ops.py -k test_cuda_equals_the_reference
	compute-sanitizer --tool racecheck --error-exitcode 9 $(BIN)/python -m pytest -q -m gpu tests/cuda/test_ops.py -k "twenty_runs or capture"

clean:
	rm -rf .venv build dist vitq.egg-info vitq-out .pytest_cache
	rm -f vitq/cpu/_kernels*.so vitq/cuda/_vitq_cuda.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
