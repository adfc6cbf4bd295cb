# Everything from a fresh clone: `make demo` and `make test` make their own environment first.
VENV    := .venv
PYTHON  := $(VENV)/bin/python
# `make test EXTRAS=dev,quant,eval` also runs the tests of lm-evaluation-harness, which is 350 MB more; without it they are skipped.
EXTRAS  := dev,quant
STAMP   := $(VENV)/.installed-$(EXTRAS)
# Two workers of one thread each fill two cores; more threads per worker only get in each other's way. A file's trials stay on one worker,
# so that what they share is made once; in the order of the folders, which has the long ones first.
TESTENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: help demo test lint types format schema unit bench clean
.DEFAULT_GOAL := help

help: ## This list.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: $(STAMP) ## The whole story on the embedded base, offline, ending in a report.
	$(VENV)/bin/sparsmith demo

test: lint types unit ## Lint, types and all tests.

lint: $(STAMP) ## Style, and formatting as it should be.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP) ## Type check of src.
	$(VENV)/bin/mypy

unit: $(STAMP) ## Tests alone.
	$(TESTENV) $(PYTHON) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

format: $(STAMP) ## Format the code and mend what lint can mend.
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

schema: $(STAMP) ## Write the recipe's JSON schema and its table of keys anew.
	$(PYTHON) tools/write_schema.py

bench: $(STAMP) ## Speed of the PESC layer and of tuning, PESC and SoFT; writes benchmarks/results.
	$(PYTHON) -m benchmarks

clean: ## Remove the environment and all caches.
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build src/*.egg-info
