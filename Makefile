PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo up test test-long spec lint types protos bench clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kernels/native/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "countersign needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' 2>.venv/pip.log || { cat .venv/pip.log; exit 1; }
	@touch $@

demo: $(STAMP) ## install into .venv, then start everything, complete five prompts, audit them, refuse forgeries
	@$(BIN)/countersign demo

up: $(STAMP) ## run the stack here until interrupted
	@$(BIN)/countersign up

test: $(STAMP) lint types ## all checks and all tests that need no GPU
	@$(BIN)/python -m pytest -q -m 'not long' $(PYTEST_ARGS)

test-long: $(STAMP) ## the slow forms of the tests
	@$(BIN)/python -m pytest -q -m long $(PYTEST_ARGS)

spec: $(STAMP) ## model-check the protocols in full: half an hour
	@$(BIN)/countersign spec check

lint: $(STAMP)
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .
	@$(BIN)/lint-imports >.venv/lint-imports.log || { cat .venv/lint-imports.log; exit 1; }

types: $(STAMP)
	@$(BIN)/mypy --no-error-summary

protos: $(STAMP) ## regenerate src/countersign/v1 from protos/
	@$(BIN)/python protos/generate.py

bench: $(STAMP) ## NAME=house: run one benchmark and keep its rows
	@$(BIN)/countersign bench $(NAME)

clean: ## remove what was built, keep the models
	rm -rf .venv build dist *.egg-info .countersign
