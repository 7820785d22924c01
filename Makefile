# make demo: the small model in this repository decodes a text, in PyTorch and in ONNX Runtime.
# make test: linters, types and all tests that need no GPU.
# make families: docs/families.md anew, for the transformers that is installed.
# All make their own virtual environment first; Python, make and pip are all they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint families clean

demo: $(VENV)/ready
	$(BIN)/cdsurgery demo

test: lint
	$(BIN)/python -m pytest

families: $(VENV)/ready
	$(BIN)/cdsurgery families --markdown > docs/families.md.new
	mv docs/families.md.new docs/families.md

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' --config-settings editable_mode=compat
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
