# `make train` and `make test` do everything they need, on a machine that has Python (3.10 or newer), make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More settings for the run, in Hydra's way: make train ARGS="lora.r=64 lora.use_rslora=true"
ARGS ?=
# Test processes; each keeps to one thread, which is quicker than one process with several.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup train test smoke lint types tests bench docs lock clean

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

# The stamp is written last, so that a set-up that was broken off is taken up again.
$(VENV)/.ready: pyproject.toml requirements.lock scripts/setup.sh
	@sh scripts/setup.sh "$(PYTHON)" "$(VENV)"
	@touch $@

setup: $(VENV)/.ready  ## make .venv, with the package installed editable in it

train: setup  ## fine-tune a small chat model to write headlines (minutes; ARGS="lora.r=8 ..." for settings)
	$(BIN)/python scripts/train.py $(ARGS)

smoke: setup  ## the same on a tiny random model, in seconds
	$(BIN)/python scripts/train.py experiment=smoke $(ARGS)

test: lint types tests  ## everything that has to pass: style, types, import floors, all tests

lint: setup  ## style, formatting and the floors that imports keep to
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup  ## static types
	$(BIN)/mypy

tests: setup  ## all tests, slow ones too (ARGS="-m 'not slow'" leaves them out)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

bench: setup  ## what training costs against PEFT and the frozen model (ARGS="--only step", ARGS="--write")
	$(BIN)/python benchmarks/bench.py $(ARGS)

docs: setup  ## the pages of docs/ as a site in site/, refused where a link leads nowhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "site/index.html; with search: $(BIN)/python -m http.server --directory site 8000"

lock: setup  ## write requirements.lock anew, keeping the versions that still fit
	sh scripts/lock.sh $(BIN)/python

clean:  ## remove caches and builds; .venv and outputs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
