# `make demo` and `make test` each set up what they need, once, in .venv.
# The newest Python that is here and was tested; 3.14, which the dependencies serve too, only if there is no other.
SUITS := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3.14 python3; do \
  "$$python" -c '$(SUITS)' >/dev/null 2>&1 && { echo "$$python"; break; }; done)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo check test test-all lint mutate docs dist newest bench bench-mtd bench-mvtec bench-edge clean help

help:
	@echo "make demo   train on solar cells, write a report and heatmaps (needs Python 3.11 to 3.13 and pip)"
	@echo "make check  run the linters and the unit tests"
	@echo "make test   run all tests but the slow ones, some seven minutes"
	@echo "make test-all  run all tests, as continuous integration does"
	@echo "make lint   run the linters"
	@echo "make mutate  change the method here and there, list the changes that no test notices: minutes"
	@echo "make docs   build the documentation: site/index.html"
	@echo "make newest  try the newest releases of all dependencies, in an environment of its own"
	@echo "make dist   build the distributions, check them, and train from a fresh environment"
	@echo "make bench  compare with Patchcore and Padim on solar cells"
	@echo "make bench-edge  exported models: answers, size and latency"
	@echo "make bench-mvtec ROOT=...  the comparison on MVTec AD, hours"
	@echo "make bench-mtd ROOT=...  the full comparison on magnetic tiles, hours"

$(BIN)/python:
	@python='$(PYTHON)'; "$${python:-none}" -c '$(SUITS)' 2>/dev/null || { \
	  echo "make needs Python 3.11 to 3.13 with venv and pip, and $${python:-none here} is not: make PYTHON=/path/to/python" >&2; exit 2; }
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
	@echo "Report:    $(RESULT)/report.html"
	@echo "Heatmaps:  $(RESULT)/images"
	@echo "Next, export for the edge:"
	@echo "  $(BIN)/anomalib export --model Sgfr --ckpt_path $(RESULT)/weights/lightning/model.ckpt \\"
	@echo "    --export_type openvino --export_root $(RESULT)"

# A file's tests share what they fitted, so a file goes to one worker; in this order, the long files first.
# A worker that dies ends the run: with a new one in its place it would wait for ever at its end.
TESTS := $(BIN)/python -m pytest -n logical --maxprocesses 4 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder
LAYERS := tests/system tests/benchmarks tests/engine tests/conformance tests/unit

check: lint
	$(TESTS) tests/unit

test: $(INSTALLED)-dev
	$(TESTS) -m "not slow" $(LAYERS)

test-all: $(INSTALLED)-dev
	$(TESTS) $(LAYERS)

lint: $(INSTALLED)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

mutate: $(INSTALLED)-dev
	$(BIN)/python -m tests.mutate

docs: $(INSTALLED)-docs
	$(BIN)/mkdocs build --strict

dist: $(INSTALLED)-dev
	.ci/dist $(BIN)/python

BENCH := $(BIN)/python -m benchmarks.compare

bench: $(INSTALLED)-demo
	$(BENCH) --dataset elpv-mono --models sgfr,patchcore,padim --limit-train 100 --set patchcore.coreset_sampling_ratio=0.01 --out runs/bench

bench-edge: $(INSTALLED)-dev
	$(BIN)/python -m benchmarks.edge --cases bare,sgfr,sgfr-half,padim --out runs/bench-edge

bench-mvtec: $(INSTALLED)-demo
	@test -n "$(ROOT)" || { echo 'Say where MVTec AD is, a folder for each category: make bench-mvtec ROOT=DIR'; exit 2; }
	$(BENCH) --dataset mvtec --root "$(ROOT)" --models sgfr,patchcore,padim --set patchcore.coreset_sampling_ratio=0.01 --out runs/bench-mvtec

bench-mtd: $(INSTALLED)-demo
	@test -n "$(ROOT)" || { echo 'Say where the images are: make bench-mtd ROOT=DIR, after'; \
	  echo '  git clone https://github.com/abin24/Magnetic-tile-defect-datasets. DIR'; exit 2; }
	$(BENCH) --dataset mtd --root "$(ROOT)" --split canonical,tile --seeds 0,1,2 --set patchcore.coreset_sampling_ratio=0.01 --out runs/bench-mtd --aspect square,own
	$(BENCH) --dataset mtd --root "$(ROOT)" --split canonical,tile --models patchcore --limit-train 200 --out runs/bench-mtd --aspect square,own

# What the constraints hold back comes first here: not part of any check.
newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --disable-pip-version-check --quiet --upgrade --upgrade-strategy eager -e ".[dev]"
	.venv-newest/bin/python -m pytest tests/conformance tests/system/test_plugin.py tests/system/test_cli.py

clean:
	rm -rf .venv .venv-newest build dist site .mypy_cache .ruff_cache .pytest_cache
