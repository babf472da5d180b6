# Every target sets itself up: the first one you call creates .venv from constraints.txt.
#   make demo    pretrain a small Llama on a novel and align it with DPO (3-5 minutes on 2 cores)
#   make test    the default test suite (under 8 minutes on 2 cores)
#   make follow  README.md and docs/, whose blocks are run as they stand: make follow ARGS=docs/lisa.md
#   make check   ruff, import-linter, mypy --strict, pydoclint
# ARGS is passed on: `make test ARGS="-k sampler -x"`, `make demo ARGS=--fast`.

SHELL := /bin/bash
PYTHON ?= python3
ARGS ?=
BENCH ?= *
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

TORCH := $(shell grep '^torch==' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
ifeq ($(GPU)$(filter Darwin,$(shell uname -s)),)
# No CUDA build carries the local version +cpu, so pip can never take one by mistake. (macOS has CPU builds only.)
TORCH := $(TORCH)+cpu
endif

.PHONY: setup demo test test-oldest test-kernels test-peer test-laws test-all follow composition check lint format imports types docstrings docs bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("development needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools
	@echo "Installing $(TORCH) ..."
ifneq ($(findstring +cpu,$(TORCH)),)
	@# First from wherever pip is configured to look (a mirror, a folder of wheels), then from PyTorch's own index.
	@$(PIP_INSTALL) $(TORCH) 2>/dev/null || $(PIP_INSTALL) --extra-index-url $(CPU_INDEX) $(TORCH) \
	  || { echo "Found no CPU build of torch: $(CPU_INDEX) must be reachable, or pip's find-links must hold $(TORCH)." >&2; exit 1; }
	@$(BIN)/python -W ignore -c 'import sys, torch; sys.exit("torch is a CUDA build on a machine without a GPU" if torch.version.cuda else 0)'
else
	@$(PIP_INSTALL) $(TORCH)
endif
	@echo "Installing lightning-align and its development tools (about 2 minutes) ..."
	@# deepspeed, a peer, is built from its sources, without a compiler; for CUDA it would look for one.
	@DS_ACCELERATOR=cpu $(PIP_INSTALL) --no-build-isolation -e '.[test,check,docs,peer]'
	@# jsonargparse's docstring_parser and pydoclint's fork of it share a folder; the fork serves both, if it comes last.
	@$(PIP_INSTALL) --no-deps --force-reinstall docstring_parser_fork
	@touch $@

demo: $(STAMP)
	$(BIN)/lightning-align demo $(ARGS)

# The whole suite in two processes, what measures time after it; what ARGS picks in one.
PARALLEL := -n 2 --dist loadfile
FILES = $(shell grep -rlE --include='test_*.py' 'mark\.$(1)\b' tests)
test: $(STAMP)
ifneq ($(ARGS),)
	$(BIN)/pytest -m "not slow and not peer and not gpu" $(ARGS)
else
	$(BIN)/pytest $(PARALLEL) -m "not slow and not peer and not gpu and not alone" --ignore=tests/helpers tests
	$(BIN)/pytest -m "alone and not slow and not peer and not gpu" $(call FILES,alone)
endif

# A fast part of the suite on the oldest version of each dependency. torch is the one of `make setup`: CPU builds of older ones
# are on PyTorch's own index alone (README.md says what was tried).
OLDEST := .venv-oldest
FAST := tests/_compat tests/layers tests/models tests/optimizers tests/run tests/modules/test_pretrain.py tests/modules/test_dpo.py \
  tests/cli/test_generate.py tests/cli/test_export.py
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt $(STAMP)
	$(PYTHON) -m venv --clear $(OLDEST)
	@$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH) 2>/dev/null \
	  || $(OLDEST)/bin/python -m pip install --quiet --extra-index-url $(CPU_INDEX) $(TORCH)
	@$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-oldest.txt $(TORCH) -e '.[test]'
	@touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/pytest $(PARALLEL) -m "not slow and not peer and not gpu and not alone and not law" \
	  --ignore=tests/_compat/test_lightning_quiet.py $(FAST) $(ARGS) # that one knows what today's versions have to say

# The arithmetic once more, with the kernels of older processors; `make test` takes the machine's own.
MATHS := tests/_compat/test_torch_attention.py tests/losses tests/optimizers tests/pipelining tests/layers tests/test_schedules.py
test-kernels: $(STAMP)
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/pytest $(PARALLEL) -m "not gpu and not alone" $(MATHS) $(ARGS)
	ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/pytest $(PARALLEL) -m "not gpu and not alone" $(MATHS) $(ARGS)

# tests/run decides by itself which of its files can be collected.
test-peer: $(STAMP)
	$(BIN)/pytest -m peer $(filter-out tests/run/%,$(call FILES,peer)) tests/run $(ARGS)

# Every law over every member and pair, docs/composition.md against what they find, and every slow test: real kills of real
# processes, the demo, examples and recipes. Without the slow ones of real weights, which are downloaded.
LAWS := (slow or law) and not peer and not gpu
WEIGHTS := tests/test_smollm2.py
test-laws: $(STAMP)
ifneq ($(ARGS),)
	$(BIN)/pytest -m "$(LAWS)" --ignore=$(WEIGHTS) $(ARGS)
else
	rm -rf .findings
	FINDINGS=$(CURDIR)/.findings $(BIN)/pytest $(PARALLEL) -m "$(LAWS) and not alone" --ignore=$(WEIGHTS) tests
	$(BIN)/pytest -m "$(LAWS) and alone" $(call FILES,alone)
	FINDINGS=$(CURDIR)/.findings $(BIN)/pytest tests/laws/test_composition.py
endif

# Two processes: a peer that has been imported makes short class names ambiguous.
test-all: $(STAMP)
	$(BIN)/pytest -m "not peer$(if $(GPU),, and not gpu)" $(ARGS)
	$(BIN)/pytest -m "peer$(if $(GPU),, and not gpu)" $(ARGS)

follow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python .ci/follow.py $(ARGS)

composition: $(STAMP) # writes docs/composition.md from what the laws find
	WRITE_COMPOSITION=1 $(BIN)/pytest tests/laws $(ARGS)

check: lint format imports types docstrings

lint: $(STAMP)
	$(BIN)/ruff check .

format: $(STAMP)
	$(BIN)/ruff format --check .

imports: $(STAMP)
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

docstrings: $(STAMP)
	$(BIN)/python .ci/docstrings.py lightning_align

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

bench: $(STAMP)
	@set -e; for script in $(wildcard benchmarks/$(BENCH).py benchmarks/*/$(BENCH).py); do echo "== $$script"; $(BIN)/python $$script $(ARGS); done

clean:
	rm -rf $(VENV) $(OLDEST) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .findings
