# The index: each target is one short command, which also runs by hand. What they stand on is in tools/environment.mk
# (the environment in .venv) and tools/native.mk (C++ and CUDA). Only what changed since is done again.
include tools/environment.mk tools/native.mk

.DEFAULT_GOAL := help
# Stages follow each other, whatever -j says; each uses all cores by itself.
.NOTPARALLEL:
.PHONY: help prepare demo check test test-long bench docs install scorecard setup-system lint test-quick test-python test-oldest test-vllm test-cpp \
  cpp-verdict test-native test-beside test-cuda cuda test-cuda-mutations test-gpu bench-gpu bench-history test-aarch64 \
  test-aarch64-python dist dist-aarch64 matrix clean

help:
	@echo 'make demo          set up everything and show both uses on a real model'
	@echo 'make check         the daily loop: linters, types, and the tests that are quick'
	@echo 'make test          everything: C++ tests, also under sanitizers, linters, types, Python tests'
	@echo 'make docs          the documentation site, in build/site'
	@echo 'make install       only the environment in .venv, with the package in it'
	@echo 'make setup-system  GoogleTest, Google Benchmark and Chromium by apt-get, for tests that are skipped without'
	@echo 'make test-long     every generated case, real models on 4,000 tokens, inductor on many architectures'
	@echo 'make test-python   the Python tests alone; make test-oldest: with the oldest transformers that is served'
	@echo 'make test-vllm     attnrb inside vLLM, in an environment of its own in build (about 4 GB)'
	@echo 'make test-cpp      the C++ tests, plain and under sanitizers; make test-aarch64: for ARM, under qemu;'
	@echo '                   make test-aarch64-python: the wheel for ARM and the op tests, under qemu'
	@echo 'make test-cuda     the CUDA kernels without a GPU: emulated device, nvcc, registers'
	@echo 'make test-gpu      C++ and op tests on the GPU at hand; make bench-gpu: its times beside PyTorch'
	@echo 'make cuda          the CUDA ops for every architecture, in build/cuda-all (needs nvcc 12 or newer)'
	@echo 'make bench         C++ and Python benches; JSON in build/bench; make bench-history compares and keeps it'
	@echo 'make dist          the source distribution and the wheel, in dist; make matrix: tested with old and new versions'
	@echo 'make scorecard     fuzz, sanitizers, planted faults, kills, pages: writes docs/reliability.md'
	@echo 'make clean         remove .venv and build'

# What is downloaded arrives while the core compiles.
prepare: $(DONE)/cmake
	@$(BIN)/python tools/side_by_side.py build/downloads.log \
	  '$(MAKE) --no-print-directory $(DONE)/cli-needs $(DONE)/model' '$(MAKE) --no-print-directory $(DONE)/core'

demo: prepare
	@$(MAKE) --no-print-directory $(DONE)/native
	$(BIN)/attnrb demo

install: $(DONE)/test $(DONE)/model $(DONE)/gemma

# The only target that installs anything outside this folder.
setup-system:
	tools/setup-system

lint: $(DONE)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

check: lint test-quick

# Installing, type checks and starting up take one core, so they go on beside what compiles. pytest comes last: it needs
# both, and its summary is then the last line.
test: prepare
	@$(MAKE) --no-print-directory $(DONE)/native
	@$(BIN)/python tools/side_by_side.py build/test-beside.log '$(MAKE) --no-print-directory test-beside' \
	  '$(MAKE) --no-print-directory test-native'
	@$(MAKE) --no-print-directory $(DONE)/test-cuda-host test-python

test-native: $(DONE)/test-cpp cpp-verdict $(DONE)/cuda-host $(DONE)/cuda-library
test-beside: lint $(DONE)/model $(DONE)/gemma test-oldest

test-quick: $(DONE)/test
	ATTNRB_TEST_SAMPLE=40 ATTNRB_TEST_GRADIENT_SAMPLE=13 $(PYTEST) -m 'not (slow or real_model or browser or vllm)'

test-python: $(DONE)/test $(DONE)/model $(DONE)/gemma
	$(PYTEST)

test-oldest: $(DONE)/test $(DONE)/oldest
	PYTHONPATH=$(OLDEST) $(PYTEST) -m oldest

# One process for each file: an engine keeps much of what it made.
test-vllm: $(DONE)/vllm-$(VLLM_VERSION)
	for each in $(VLLM_TESTS); do $(VLLM)/bin/python -m pytest -c tests/vllm/pytest.ini -q tests/vllm/test_$$each.py || exit 1; done

test-long: $(DONE)/test $(DONE)/model $(DONE)/gemma
	ATTNRB_TEST_CASES=10000 $(MAKE) --no-print-directory test-cpp
	ATTNRB_LONG=1 $(MAKE) --no-print-directory test-cuda
	ATTNRB_LONG=1 $(BIN)/python -m pytest --durations=10 -m 'slow or real_model'

# Strict: a warning is an error. MkDocs Material would print an advertisement of its successor.
docs: $(DONE)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(DONE)/test $(DONE)/model
	tools/bench $(CMAKE) $(JOBS) $(BIN)/python

# Draws also where something got slower; the status still says so.
bench-history: $(DONE)/test
	$(BIN)/python bench/python/history.py add build/bench; status=$$?; $(BIN)/python docs/images/history.py && exit $$status

# Rows of two processes at a time; one row again: .venv/bin/python tests/scorecard/run.py --rows NAME.
scorecard: $(DONE)/test $(DONE)/model
	$(BIN)/python tests/scorecard/run.py

# One wheel for every Python. TRY='3.10:2.10.0 3.13:newest' installs it in bare environments, Python:torch.
dist: $(DONE)/dist
	$(BIN)/python tools/dist.py $(if $(TRY),--try $(TRY))

# The same for 64-bit ARM, cross-compiled.
dist-aarch64: $(DONE)/dist
	$(BIN)/python tools/aarch64.py wheel

test-aarch64-python: dist-aarch64
	$(BIN)/python tools/aarch64.py test

matrix: $(DONE)/dist
	$(BIN)/python tools/matrix.py $(ROWS)

bench-gpu: $(DONE)/test
	$(BIN)/python bench/python/bench_gpu.py --json build/bench/gpu.json

clean:
	rm -rf $(VENV) build
