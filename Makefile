# Each target makes its own environment: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable

# Python must not put this folder on its path: `kernels` here is not Hugging Face's package of that name.
export PYTHONSAFEPATH := 1
# Of that path setuptools warns too, in ten lines, at each editable install.
QUIETLY := PYTHONWARNINGS='ignore:Editable installation'

.PHONY: demo test kernels sanitize tensorrt check lint types mutations clean

demo: $(INSTALLED)
	$(BIN)/svg2 demo

# Most of the time goes into tests that compile whole models; then comes Triton's interpreter, which runs the kernels on
# the CPU, one process for a file of tests.
test: $(TESTABLE)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# Every kernel for every GPU generation; `make test` compiles two of them.
kernels: $(INSTALLED)
	SVG2_AOT=all $(BIN)/pytest tests/kernels/test_aot.py

# The kernels under NVIDIA's compute-sanitizer, where there are a GPU and the tool.
sanitize: $(INSTALLED)
	$(BIN)/python benchmarks/kernels/sanitize.py

# Dense segments of tiny models converted and built for TensorRT-RTX; needs no GPU. Skipped, with the reason, where the
# packages do not install.
tensorrt:
	sh tests/tensorrt_environment.sh $(PYTHON) $(VENV)-tensorrt
	[ ! -f $(VENV)-tensorrt/.installed ] || OMP_NUM_THREADS=1 $(VENV)-tensorrt/bin/pytest -s tests/api/test_tensorrt_build.py

check: lint types test

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

mutations: $(INSTALLED)
	$(BIN)/python tests/mutation/run_mutations.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(QUIETLY) $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# The demo does without these.
$(TESTABLE): $(INSTALLED)
	$(QUIETLY) $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,composition]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-tensorrt build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
