# `make demo` and `make test` each set up what they need, once, in .venv.
PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint mutate bench bench-mtd bench-edge clean help

help:
	@echo "make demo   train on solar cells, write heatmaps (needs Python 3.11 and pip)"
	@echo "make test   run the tests"
	@echo "make lint   run the linters"
	@echo "make mutate  change the method here and there, list the changes that no test notices: minutes"
	@echo "make docs   build the documentation: site/index.html"
	@echo "make bench  compare with Patchcore and Padim on solar cells"
	@echo "make bench-edge  exported models: answers, size and latency"
	@echo "make bench-mtd ROOT=...  the full comparison on magnetic tiles, hours"

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
	$(BIN)/lint-imports --no-logo

mutate: $(INSTALLED)-dev
	$(BIN)/python -m tests.mutate

.PHONY: docs
docs: $(INSTALLED)-docs
	$(BIN)/mkdocs build --strict

BENCH := $(BIN)/python -m benchmarks.compare

bench: $(INSTALLED)-demo
	$(BENCH) --dataset elpv-mono --models sgfr,patchcore,padim --limit-train 100 --set patchcore.coreset_sampling_ratio=0.01 --out runs/bench

bench-edge: $(INSTALLED)-dev
	$(BIN)/python -m benchmarks.edge --cases bare,sgfr-1000,sgfr-5000,padim --out runs/bench-edge

bench-mtd: $(INSTALLED)-demo
	@test -n "$(ROOT)" || { echo 'Say where the images are: make bench-mtd ROOT=DIR, after'; \
	  echo '  git clone https://github.com/abin24/Magnetic-tile-defect-datasets. DIR'; exit 2; }
	$(BENCH) --dataset mtd --root "$(ROOT)" --split canonical,tile --seeds 0,1,2 --set patchcore.coreset_sampling_ratio=0.01 --out runs/bench-mtd
	$(BENCH) --dataset mtd --root "$(ROOT)" --split canonical,tile --models patchcore --limit-train 200 --out runs/bench-mtd

clean:
	rm -rf .venv build dist site .mypy_cache .ruff_cache .pytest_cache
