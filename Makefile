# `make demo` and `make test` each set up what they need, once, in .venv.
PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint clean help

help:
	@echo "make demo   train on solar cells, write heatmaps (needs Python 3.11 and pip)"
	@echo "make test   run the tests"
	@echo "make lint   run the linters"

$(BIN)/python:
	$(PYTHON) -m venv .venv

# One stamp per set of extras; an unchanged pyproject.toml and constraints.txt install nothing again.
$(INSTALLED)-%: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[$*]"
	@touch $@

DEMO := $(BIN)/anomalib train --model Sgfr --config configs/elpv_edge.yaml

RESULT := results/Sgfr/ELPV/mono/latest

demo: $(INSTALLED)-demo
	$(DEMO)
	@echo
	@echo "Heatmaps:  $(RESULT)/images"
	@echo "Next, export for the edge:"
	@echo "  $(BIN)/anomalib export --model Sgfr --ckpt_path $(RESULT)/weights/lightning/model.ckpt --export_type openvino"

test: $(INSTALLED)-dev
	$(BIN)/python -m pytest -n 2

lint: $(INSTALLED)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache
