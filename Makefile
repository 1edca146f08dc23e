# Everything a clone needs: `make demo`, `make test`. Settings: make VARIABLE=value TARGET
PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
# What pip installs; for instance TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" is a smaller download.
TORCH ?= torch==$(TORCH_VERSION)
VENV ?= .venv
PYTEST_ARGS ?=
# Processes that run tests, each whole files of them. Of two, one waits less often for a compiler, an emulator or a thread.
PYTEST_WORKERS ?= 2
BENCH_ARGS ?=
DEMO_ARGS ?=
FUZZ_ARGS ?=
export FASTSEQ_CUDA FASTSEQ_DEBUG TORCH_CUDA_ARCH_LIST

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help venv build demo test test-serving test-aarch64 aarch64-tools fuzz bench lint format clean distclean FORCE

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
PATH := $(abspath $(VENV))/bin:$(PATH)
export PATH
STAMPS := $(VENV)/.fastseq
say = @printf '== %s\n'

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

# --- environment and build: each step leaves a stamp, so that a second run does only what is out of date --------------

# $(call record,text): a target that holds `text` and is touched only when the text changes.
define record
@mkdir -p $(@D); printf '%s\n' '$(1)' | cmp -s - $@ || printf '%s\n' '$(1)' > $@
endef

$(PY):
	$(say) "venv: creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "No virtual environment: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }

$(STAMPS)/torch.wanted: FORCE | $(PY)
	$(call record,$(TORCH))

$(STAMPS)/torch: $(STAMPS)/torch.wanted
	$(say) "venv: installing $(TORCH) and the build tools (the first time this downloads a lot)"
	@$(PIP) install -q --upgrade "setuptools>=77,<82" wheel ninja pybind11 numpy
	@$(PIP) install -q $(TORCH)
	@touch $@

$(STAMPS)/build.wanted: FORCE | $(PY)
	$(call record,FASTSEQ_CUDA=$(FASTSEQ_CUDA) FASTSEQ_DEBUG=$(FASTSEQ_DEBUG) TORCH_CUDA_ARCH_LIST=$(TORCH_CUDA_ARCH_LIST) CXX=$(CXX) CXXFLAGS=$(CXXFLAGS))

# Directories are among the prerequisites too: their time changes when a file goes away. The sed keeps one short line per
# C++ file; those of .cu files are short already.
EXTENSION := $(wildcard fastseq/_C.*.so)
$(STAMPS)/build: $(STAMPS)/torch $(STAMPS)/build.wanted setup.py $(shell find csrc -not -path '*/__pycache__*') $(if $(EXTENSION),,FORCE)
	$(say) "build: compiling what changed in csrc/ (a few minutes from nothing, seconds otherwise)"
	@$(PY) setup.py -q build_ext --inplace 2>&1 | \
	    sed -u -E 's@^(\[[0-9]+/[0-9]+\]) .* -c ([^ ]*/)?(csrc/[^ ]+) .*@\1 \3@'
	@touch $@

# fastseq editable, with optional dependencies; what was compiled above is used again. Torch is named to stay what it is.
$(STAMPS)/install: EXTRAS := test,demo,serve
$(STAMPS)/ray: EXTRAS := ray
$(STAMPS)/bench: EXTRAS := bench
$(STAMPS)/dev: EXTRAS := dev
$(STAMPS)/install $(STAMPS)/bench $(STAMPS)/dev $(STAMPS)/ray: pyproject.toml | $(STAMPS)/build
	$(say) "venv: installing fastseq[$(EXTRAS)] into $(VENV)"
	@$(PIP) install -q --no-build-isolation -e ".[$(EXTRAS)]" "$(firstword $(TORCH))"
	@touch $@

venv: $(STAMPS)/torch ## the virtual environment with torch and the build tools

build: $(STAMPS)/build $(STAMPS)/install ## compile the extension and install fastseq into the virtual environment
	$(say) "build: ready"

# --- what the build is for --------------------------------------------------------------------------------------------

demo: build ## train on handwritten digits, optimise, compare answers and times
	$(say) "demo: examples/digits.py $(DEMO_ARGS)"
	@$(PY) examples/digits.py $(DEMO_ARGS)

test: build ## run the tests
	$(say) "test: pytest -q -n $(PYTEST_WORKERS) $(PYTEST_ARGS)"
	@$(PY) -m fastseq
	@$(PY) -m pytest -q -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations 20 $(PYTEST_ARGS) && echo "== test: PASSED" || { echo "== test: FAILED" >&2; exit 1; }

# The test itself is part of `make test`, where it is skipped without these tools.
aarch64-tools:
	@command -v aarch64-linux-gnu-g++ >/dev/null && { command -v qemu-aarch64-static || command -v qemu-aarch64; } >/dev/null || \
	    { echo "No aarch64 cross compiler or no qemu: on Debian and Ubuntu, apt install g++-aarch64-linux-gnu qemu-user-static" >&2; exit 1; }

test-aarch64: aarch64-tools build ## run the kernels' tests on an emulated aarch64 CPU
	$(say) "test-aarch64: pytest -q tests/test_kernel_harness.py -k aarch64"
	@$(PY) -m pytest -q tests/test_kernel_harness.py -k aarch64

test-serving: build $(STAMPS)/ray ## the servers' tests, Ray Serve's among them
	$(say) "test-serving: pytest -q tests/test_serving*.py"
	@$(PY) -m pytest -q tests/test_serving*.py

fuzz: build ## compare random models, plain and optimised (FUZZ_ARGS="--cases 20000 --jobs 2")
	$(say) "fuzz: python -m tests.fuzz $(FUZZ_ARGS)"
	@$(PY) -m tests.fuzz $(FUZZ_ARGS)

bench: build $(STAMPS)/bench ## compare speeds with other engines (many minutes)
	$(say) "bench: benchmarks/bench_models.py $(BENCH_ARGS)"
	@$(PY) benchmarks/bench_models.py $(BENCH_ARGS)

lint: build $(STAMPS)/dev ## ruff, mypy and clang-format, changing nothing
	$(say) "lint: ruff, mypy, clang-format"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@git ls-files -co --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r clang-format --dry-run -Werror

format: $(STAMPS)/dev ## rewrite the sources in the project's format
	$(say) "format: ruff, clang-format"
	@$(PY) -m ruff check -q --fix .
	@$(PY) -m ruff format -q .
	@git ls-files -co --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r clang-format -i

clean: ## remove what was built, keep the virtual environment
	rm -rf build dist *.egg-info fastseq/_C.*.so $(STAMPS)/build $(STAMPS)/install
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment too
	rm -rf $(VENV)
