# make run    prices DeepSeek-V3 and gpt-oss-120b from published kernel measurements, writes out/report.html
# make test   lint, import contract, types, tests
#
# PYTHON=python3.12   the interpreter that makes the environment
# VENV=path           an environment of your own; a torch already in it is kept

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml

.PHONY: run test
.DEFAULT_GOAL := run

run: $(VENV)/.tokenfab-run
	$(BIN)/tokenfab cost deepseek-v3 gpt-oss-120b --report out/report.html

test: $(VENV)/.tokenfab-test
	mkdir -p build/typing && ln -sfn $(CURDIR) build/typing/tokenfab
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.tokenfab-run: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.tokenfab-test: $(BIN)/python $(SOURCES) constraints-cpu.txt
	{ $(BIN)/python -m pip freeze | grep '^torch==' || command -v nvidia-smi || cat constraints-cpu.txt; } \
	  | grep '^torch==' > $(VENV)/constraints.txt || true
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[kernels,test]'
	touch $@ $(VENV)/.tokenfab-run
