# make demo: the small model in this repository decodes a text, in PyTorch and in ONNX Runtime.
# make test: linters, types and tests that need no GPU. A Triton server, from PyPI, runs in one of them.
# make thorough: also those whose graphs are like others, such as every family that is exported; half an hour.
# make clients: tests of clients that need an older transformers than ours, in an environment of their own.
# make families: docs/families.md anew, for the transformers that is installed.
# make tensorrt-families: the table of docs/tensorrt.md anew, with the TensorRT that is installed.
# All make their own virtual environments first; Python, make and pip are all they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test thorough clients lint families tensorrt-families clean

demo: $(VENV)/ready
	$(BIN)/cdsurgery demo

# A file is one worker's, since what takes long, exporting a model, is done once a file.
test: lint .venv-triton/ready
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

thorough: lint .venv-triton/ready
	$(BIN)/python -m pytest --thorough --numprocesses auto --dist loadfile

clients: $(VENV)/ready .venv-optimum/ready
	$(BIN)/python -m pytest tests/test_optimum.py

families: $(VENV)/ready
	$(BIN)/cdsurgery families --markdown > docs/families.md.new
	mv docs/families.md.new docs/families.md

tensorrt-families: $(VENV)/ready
	$(BIN)/python examples/tensorrt_families.py --into docs/tensorrt.md

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' --config-settings editable_mode=compat
	touch $@

.venv-triton/ready: tests/clients/triton.txt
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/pip install --quiet --requirement tests/clients/triton.txt
	touch $@

# What python -m benchmarks generation compares with.
.venv-dola/ready: benchmarks/dola.txt
	$(PYTHON) -m venv .venv-dola
	.venv-dola/bin/pip install --quiet --requirement benchmarks/dola.txt
	touch $@

.venv-optimum/ready: tests/clients/optimum.txt
	$(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/pip install --quiet --requirement tests/clients/optimum.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-dola .venv-optimum .venv-triton build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
