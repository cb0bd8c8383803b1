# The commands. `make train DATA=my.jsonl` runs `python -m train train data=my.jsonl`: every KEY=value typed after `make` goes
# to the command as it is, its key in lower case; the command refuses, by name, a key that it does not know.
PYTHON ?=#           interpreter for .venv: 3.10 or 3.11 (default: the first found)
TORCH ?=#            cu118 | cu128 | registry (default: by the card and its driver; set-up prints which, and why)
TORCH_INDEX_URL ?=#  mirror of PyTorch's index
UPGRADE ?=#          1: `make lock` takes the newest of everything
ARGS ?=#             more words for the command: ARGS="epochs=3 system='You are Ada.'"
export PYTHON TORCH TORCH_INDEX_URL UPGRADE

SHELL := /bin/bash
PY := .venv/bin/python
settings := PYTHON TORCH TORCH_INDEX_URL UPGRADE ARGS SHELL PY

# _pairs: what was typed after `make`, as key=value words for the shell, quoted whatever is in them
define _newline


endef
_quote = '$(subst $(_newline),'$$'\n'',$(subst ','\'',$(1)))'
_key = $(shell tr A-Z a-z <<<'$(patsubst FROM,FROM_RUN,$(1))')
_typed = $(sort $(foreach v,$(filter-out $(settings) -%,$(.VARIABLES)),$(if $(findstring command line,$(origin $(v))),$(v))))
_pairs = $(foreach v,$(_typed),$(call _key,$(v))=$(call _quote,$(value $(v)))) $(value ARGS)
# _base: what `make train` fetches first
_base = $(PY) -c 'import sys; from train.verbs.train import wanted_base as base; print(base(sys.argv[1:]))' $(_pairs)
_some = $(foreach v,$(filter $(1),$(_typed)),$(call _key,$(v))=$(call _quote,$(value $(v))))

.PHONY: help setup demo test test-all model data train export infer compare quantize lint lock lock-check clean

help: ## this list
	@echo "make TARGET [KEY=value ...] [ARGS=\"key=value ...\"]        first: make demo        keys of a command: make TARGET ARGS=--help"
	@awk -F ': .*## |: ## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' Makefile
	@echo "settings of set-up:"
	@awk -F '[?]=#  *' '/^[A-Z_]+ [?]=#/ { printf "  %-16s %s\n", $$1 "=", $$2 }' Makefile

setup: ## .venv from env.lock, every file by its hash; done once, every other target does it too
	@docker/setup

demo: setup ## the whole way on this machine, from nothing: a small Qwen fetched, made Int4, trained, merged, compared
	@$(PY) -m train demo $(_pairs)

test: setup ## unit tests and the short end-to-end
	@$(PY) -m pytest -q $(value ARGS)

test-all: setup ## every test that this machine can run; names and counts those that it cannot
	@$(PY) -m pytest -q -m "not gpu" -p tests.machine $(value ARGS)
	@$(PY) -m pytest -q -m gpu -p tests.machine $(value ARGS)

model: setup ## fetch and verify a base: MODEL= a name in data/models.lock, a hub id, or a folder
	@$(PY) -m train model $(_pairs)

data: setup ## check a data set and sum it up; errors with file, line and column: DATA=
	@$(PY) -m train data $(_pairs)

train: setup ## fine-tune, or go on where it was cut off: DATA= [MODEL=] [RECIPE=] [RUN=] [FROM=] [GPUS=]
	@base=$$($(_base)) && { [ -z "$$base" ] || $(PY) -m train model model="$$base" $(call _some,MODELS); }
	@$(PY) -m train train $(_pairs)

export: setup ## merged float weights, verified: RUN= [DTYPE=] [LAYOUT=] [ONTO=] [OUT=]
	@$(PY) -m train export $(_pairs)

infer: setup ## chat, or answer once: [RUN= or MODEL=] [PROMPT=] [SYSTEM=] [ENGINE=stock TRUST_REMOTE_CODE=1]
	@$(PY) -m train infer $(_pairs)

compare: setup ## the same questions before and after: RUN=
	@$(PY) -m train compare $(_pairs)

quantize: setup ## an Int4 folder, as Qwen publishes them, of a float model: MODEL= [OUT=]
	@$(PY) -m train quantize $(_pairs)

lint: setup ## formatter, linter and types, as CI runs them
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy

lock: setup ## resolve pyproject.toml into env.lock again; what is pinned stays, but with UPGRADE=1
	@$(PY) docker/lock.py write

lock-check: setup ## does env.lock still follow from pyproject.toml?
	@$(PY) docker/lock.py check

clean: ## remove .venv and the caches; models/ and runs/ stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './models/*' -not -path './runs/*' -prune -exec rm -rf {} +
	@echo "models/ and runs/ are left alone; remove them yourself to free their space."
