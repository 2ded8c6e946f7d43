# make run    prices DeepSeek-V3 and gpt-oss-120b from published kernel measurements, writes out/report.html
# make test   lint, import contract, types, tests, and the kernels' tests once more with the oldest Triton
# make gpu    on a machine with a GPU, torch and Triton: the kernels' tests there (gpu-test), then `tokenfab lab` for
#             MINUTES into bench/recorded (gpu-lab)
# make gpu-many   on a machine with several GPUs: the step over GPUS ranks of each of MODELS held to one rank's, then
#             measured into bench/recorded; with Ray installed, a sweep over Ray held to a plain one
# make gpu-deps   what `make gpu` needs beside them (NumPy comes with torch), into build/gpu-deps, to carry to a machine without a network
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

# One worker per core; a benchmark wants the machine to itself
PARALLEL := -n auto --dist worksteal

.PHONY: run test test-oldest gpu gpu-test gpu-lab gpu-many gpu-deps
.DEFAULT_GOAL := run

run: $(VENV)/.tokenfab-run
	$(BIN)/tokenfab cost deepseek-v3 gpt-oss-120b --report out/report.html

test: $(VENV)/.tokenfab-test
	mkdir -p build/typing && ln -sfn $(CURDIR) build/typing/tokenfab
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest $(PARALLEL) --ignore tests/benchmarks
	$(BIN)/python -m pytest tests/benchmarks
	$(MAKE) test-oldest

# The same packages with only Triton (and what it needs) replaced: its folder comes first on the path.
test-oldest: $(OLDEST_VENV)/.tokenfab-oldest
	$(OLDEST_VENV)/bin/python -m pytest $(PARALLEL) tests/kernels tests/bench/test_inspect.py \
	  tests/bench/test_inspect_gate.py tests/bench/test_campaign.py tests/bench/test_decode_step.py

GPU_PYTHON ?= python3
GPU_PYTHON_VERSION ?= 3.12
MINUTES ?= 20
ON_GPU := PYTHONPATH=$(CURDIR)/build/typing:$(CURDIR)/build/gpu-deps $(GPU_PYTHON)

gpu: gpu-test gpu-lab

gpu-test:
	mkdir -p build/typing && ln -sfn $(CURDIR) build/typing/tokenfab
	$(ON_GPU) -m pytest tests/kernels tests/reliability/test_walk_*.py tests/bench/test_decode_step.py \
	  -k "not points and not codec" -p no:cacheprovider

gpu-lab:
	mkdir -p build/typing && ln -sfn $(CURDIR) build/typing/tokenfab
	$(ON_GPU) -m tokenfab lab --minutes $(MINUTES) --out bench/recorded

GPUS ?= 2
MODELS ?= deepseek-v3 qwen3-30b-a3b gpt-oss-120b
RANKS := -m torch.distributed.run --standalone --nproc-per-node $(GPUS) -m tokenfab ranks

gpu-many:
	mkdir -p build/typing && ln -sfn $(CURDIR) build/typing/tokenfab
	set -e; for model in $(MODELS); do \
	  $(ON_GPU) $(RANKS) $$model --check; $(ON_GPU) $(RANKS) $$model --out bench/recorded; \
	done
	$(ON_GPU) -m pytest tests/bench/test_fleet_gpus.py -k medians_of_a_plain -p no:cacheprovider

gpu-deps:
	$(PYTHON) -m pip install --quiet --upgrade --target build/gpu-deps --python-version $(GPU_PYTHON_VERSION) \
	  --only-binary=:all: --no-deps click msgspec rich markdown-it-py mdurl pygments nvidia-ml-py pyyaml safetensors \
	  pytest pluggy iniconfig packaging hypothesis sortedcontainers ml_dtypes

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
