# make run    prices DeepSeek-V3 and gpt-oss-120b from published kernel measurements, writes out/report.html
# make test   lint, import contract, types, tests, and the kernels' tests once more with the oldest Triton
#
# PYTHON=python3.12   the interpreter that makes the environment
# VENV=path           an environment of your own; a torch already in it is kept

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml
# torch 2.11 pins this Triton; its interpreter needs NumPy < 2.4
OLDEST := triton==3.6.0 numpy==2.3.5
OLDEST_VENV := $(VENV)-oldest-triton

.PHONY: run test test-oldest
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
	$(MAKE) test-oldest

# The same packages with only Triton (and what it needs) replaced: its folder comes first on the path.
test-oldest: $(OLDEST_VENV)/.tokenfab-oldest
	$(OLDEST_VENV)/bin/python -m pytest tests/kernels tests/bench/test_inspect.py tests/bench/test_campaign.py

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

$(OLDEST_VENV)/.tokenfab-oldest: $(VENV)/.tokenfab-test Makefile
	$(BIN)/python -m venv --without-pip $(OLDEST_VENV)
	$(BIN)/python -m pip --python $(OLDEST_VENV)/bin/python install --quiet --no-deps $(OLDEST)
	base=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	own=$$($(OLDEST_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	echo "import site; site.addsitedir('$$base')" > $$own/newest.pth
	touch $@
