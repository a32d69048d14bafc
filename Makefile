# Everything a newcomer or CI runs. Each target is the command it shows; `make` lists them.
# A fresh machine needs python3.11 or newer (PYTHON=…) and nothing else.

PYTHON ?= python3

# What to install first, so that the choice of torch (version, index) is made here and nowhere else.
# On Linux the registry's default build brings several GB of CUDA libraries; if you have a CPU build,
# name it: `make test TORCH=path/to/torch.whl`. Any torch >= 2.11 works.
TORCH ?= torch==2.13.0

BIN := .venv/bin
INSTALLED := .venv/installed
RUN := $(BIN)/zimage-fp8
DEMO := .demo
PROMPT := a red apple on a blue background

help:  ## what each target does
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{ printf "  make %-9s %s\n", $$1, $$2 }'

setup: $(INSTALLED)  ## create .venv and install the package with its development tools, once

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)  ## quantize, generate, serve, measure and describe the embedded model, all policies
	rm -rf $(DEMO) && mkdir $(DEMO)
	$(RUN) doctor
	$(RUN) quantize nano --policy full --dry-run
	$(RUN) generate "$(PROMPT)" --model nano -o $(DEMO)/picture.png
	$(RUN) bench nano --policies all --out $(DEMO)/bench
	for checkpoint in $(DEMO)/bench/checkpoints/*/; do $(RUN) verify $$checkpoint --against nano || exit 1; done
	$(RUN) card $(DEMO)/bench/checkpoints --results $(DEMO)/bench/record.json
	@printf '\nreport    %s\npictures  %s\ncards     %s\n' $(DEMO)/bench/report.md \
	  "$(DEMO)/picture.png $$(echo $(DEMO)/bench/*.png)" '$(DEMO)/bench/checkpoints/*/README.md'

test: $(INSTALLED)  ## every test that needs no GPU
	$(BIN)/pytest

test-gpu: $(INSTALLED)  ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu

lint: $(INSTALLED)  ## formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict src

fmt: $(INSTALLED)  ## repair formatting and what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## render the tables and the command reference from results and --help
	$(BIN)/python benchmarks/render.py

.PHONY: help setup demo test test-gpu lint fmt docs
