# C++ and CUDA: what CMake builds and ctest runs. CMakePresets.json has the same builds for use by hand.
CMAKE := $(BIN)/cmake
CTEST := $(BIN)/ctest --parallel $(JOBS) --output-on-failure
# CMake keeps the compiler that it found first; everything here builds without torch.
CORE_BUILD := -G Ninja -D CMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -D ATTNRB_BUILD_PACKAGE=OFF -D ATTNRB_WERROR=ON
CUDA_BUILD := $(CORE_BUILD) -D Python_EXECUTABLE=$(CURDIR)/$(BIN)/python
CUDA_LIBRARY_BUILD := $(CUDA_BUILD) -D ATTNRB_BUILD_CUDA_LIBRARY=ON -D ATTNRB_CUDA=ON

CPP_FILES := $(shell find csrc cuda tests/cpp tests/cuda_host tests/cuda_gpu bench/cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu')
CMAKE_FILES := CMakeLists.txt tests/cpp/CMakeLists.txt $(wildcard cmake/*.cmake)
CUDA_FILES := $(filter-out bench/% csrc/core/kernels/% tests/cuda_gpu/%,$(CPP_FILES)) $(CMAKE_FILES) cuda/sources.cmake \
  tests/cuda_host/CMakeLists.txt

# Generated cases. The sanitized run is many times slower, and the emulated device takes a millisecond for a tile: enough
# to reach every feature. make test-long runs 10,000, and make scorecard many more.
PLAIN_CASES := $(or $(ATTNRB_TEST_CASES),1000)
SANITIZED_CASES := 200
EMULATED_CASES := $(if $(ATTNRB_LONG),400,150)
EMULATED_SAMPLE := ATTNRB_TEST_GRADIENT_SAMPLE=11 ATTNRB_TEST_REPEATS=2 $(if $(ATTNRB_LONG),,ATTNRB_TEST_SAMPLE=7)
EMULATED_OPS := $(CURDIR)/build/cuda-host/tests/cuda_host/libattnrb_cuda_host_ops.so
# Compiling for one architecture shows that the kernels compile, and how; make test-cuda adds another and PTX.
CUDA_TEST_TARGETS := 80-real
CUDA_ALL_TEST_TARGETS := 80-real;90-real;80-virtual

test-cpp:
	@rm -f $(DONE)/test-cpp
	@$(MAKE) --no-print-directory $(DONE)/test-cpp cpp-verdict

# With the core of the package, not compiled a second time.
$(DONE)/test-cpp: $(filter-out bench/% cuda/% tests/cuda_host/% tests/cuda_gpu/%,$(CPP_FILES)) $(CMAKE_FILES) $(DONE)/core
	$(CMAKE) -S . -B build/cpp $(CORE_BUILD) -D ATTNRB_BUILD_TESTS=ON -D ATTNRB_CORE_ARCHIVE=$(CORE)
	$(CMAKE) --build build/cpp --parallel $(JOBS)
	ATTNRB_TEST_CASES=$(PLAIN_CASES) $(CTEST) --test-dir build/cpp
	$(CMAKE) -S . -B build/cpp-sanitized $(CORE_BUILD) -D ATTNRB_BUILD_TESTS=ON -D CMAKE_BUILD_TYPE=None \
	  -D CMAKE_CXX_FLAGS=-O1 -D ATTNRB_SANITIZE=address,undefined
	$(CMAKE) --build build/cpp-sanitized --parallel $(JOBS)
	ATTNRB_TEST_CASES=$(SANITIZED_CASES) $(CTEST) --test-dir build/cpp-sanitized
	@test ! -x build/cpp/tests/cpp/attnrb_tests || touch $@

# Said also where nothing was run because nothing changed since.
cpp-verdict:
	@if test -e $(DONE)/test-cpp; then \
	  echo 'The C++ tests have passed for these sources; make test-cpp runs them again.'; \
	else echo 'C++ tests skipped: GoogleTest is not installed (make setup-system) and could not be downloaded.'; fi

test-aarch64: $(DONE)/tools
	tools/test-aarch64 $(CMAKE) $(JOBS)

# ---------------------------------------------------------------------------------------------------- CUDA

test-cuda: $(DONE)/test
	@rm -f $(DONE)/cuda-host $(DONE)/cuda-library
	@$(MAKE) --no-print-directory $(DONE)/test-cuda-host $(DONE)/cuda-library 'CUDA_TEST_TARGETS=$(CUDA_ALL_TEST_TARGETS)'
	$(BIN)/python -m pytest tests/python/test_cuda_library.py

# The kernels' own source on an emulated device: the C++ tests of the core, then the op tests from Python.
$(DONE)/cuda-host: $(CUDA_FILES) $(DONE)/tools
	$(CMAKE) -S . -B build/cuda-host $(CUDA_BUILD) -D ATTNRB_BUILD_CUDA_TESTS=ON -D ATTNRB_BUILD_CUDA_HOST_OPS=ON
	$(CMAKE) --build build/cuda-host --target attnrb_cuda_emulated --parallel $(JOBS)
	ATTNRB_TEST_CASES=$(EMULATED_CASES) $(CTEST) --test-dir build/cuda-host
	@test ! -f $(EMULATED_OPS) || touch $@

$(DONE)/test-cuda-host: $(DONE)/cuda-host $(DONE)/test
	@if test -f $(EMULATED_OPS); then \
	  echo 'The op tests on the emulated device:'; \
	  ATTNRB_TEST_EMULATED_CUDA=$(EMULATED_OPS) ATTNRB_CUDA_CHECKS=1 OMP_NUM_THREADS=1 $(EMULATED_SAMPLE) \
	  $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal -m emulated && touch $@; \
	else echo 'The emulated device was not tested: GoogleTest is not installed (make setup-system) and could not be downloaded.'; fi

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
test-gpu: $(DONE)/test
	tools/test-gpu $(CMAKE) $(JOBS) $(CORE_BUILD)
	ATTNRB_TEST_DEVICE=cuda $(BIN)/python -m pytest -m emulated
	$(BIN)/python -m pytest tests/python/test_gpu.py tests/python/test_gpu_offsets.py
