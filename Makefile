# The commands. `make train DATA=my.jsonl` runs `docker/run train data=my.jsonl`, which runs `python -m train train
# data=my.jsonl` in the container where a Docker engine answers, else in .venv. Every KEY=value typed after `make` goes
# to the command as it is, its key in lower case; the command refuses, by name, a key that it does not know. The
# settings below count before the word make too (RUNTIME=local make train); keys there are refused, because a platform
# may have set a DATA or MODEL of its own.
ARGS ?=#             more words for the command: ARGS="epochs=3 system='You are Ada.'"
RUNTIME ?=#          docker | local (default: docker where an engine answers; demo, bench and test are always local)
ACCELERATOR ?=#      gpu | cpu (default: gpu where nvidia-smi answers)
IMAGE ?=#            image to build or use (default: qwen-finetune:VERSION-cu118, or what was built last)
CUDA ?=#             of the image: 11.8, or 12.8 for Blackwell cards
BASE_IMAGE ?=#       of the image (default: NVIDIA's, by digest; ubuntu for Ubuntu's alone)
TORCH ?=#            cu118 | cu128 | registry (default: the image by CUDA=, .venv by the card and its driver, which it says)
PYTHON ?=#           interpreter for .venv: 3.10 or 3.11 (default: the first found)
CA ?=#               certificates of a proxy that re-signs TLS, for the image and its network
PIP_INDEX_URL ?=#    mirror of the package registry
TORCH_INDEX_URL ?=#  mirror of PyTorch's index
APT_MIRROR ?=#       mirror of the base image's packages
HF_ENDPOINT ?=#      mirror of the model hub
API_KEY ?=#          key that clients of `make serve` must send; needed for HOST= other than 127.0.0.1
STUDIO_TOKEN ?=#     token that `make studio` asks a browser for; needed for HOST= other than 127.0.0.1
UPGRADE ?=#          1: `make lock` takes the newest of everything

SHELL := /bin/bash
PY := .venv/bin/python
settings := $(shell sed -n 's/^\([A-Z_]*\) ?=.*/\1/p' Makefile) HF_TOKEN SHELL PY
$(foreach s,$(filter-out ARGS SHELL,$(settings)),$(if $(value $(s)),$(eval export $(s))))

# _pairs: what was typed after `make`, as key=value words for the shell, quoted whatever is in them
define _newline


endef
_quote = '$(subst $(_newline),'$$'\n'',$(subst ','\'',$(1)))'
_key = $(shell tr A-Z a-z <<<'$(patsubst FROM,FROM_RUN,$(1))')
_typed = $(sort $(foreach v,$(filter-out $(settings) -%,$(.VARIABLES)),$(if $(findstring command line,$(origin $(v))),$(v))))
_keys = DATA MODEL RECIPE RUN FROM STAGE GPUS GPU CLEAN HELD_OUT PROMPT SYSTEM QUESTIONS ANSWERS ENGINE DTYPE LAYOUT FORMAT ENCODING ONTO OUT HTML REPLAY LOG MODELS RUNS $(if $(filter serve,$@),PORT SLOTS LENGTH QUEUE)$(if $(filter studio,$@),PORT)
_before = $(strip $(foreach k,$(_keys),$(if $(filter environment,$(origin $(k))),$(if $(value $(k)),$(k)))))
_refused = $(if $(_before),$(error $(_before) is set in the environment, where it does not count. \
Type it after the target (make $@ $(firstword $(_before))=…), or unset it (unset $(_before))))
_pairs = $(_refused)$(foreach v,$(_typed),$(call _key,$(v))=$(call _quote,$(value $(v)))) $(value ARGS)

.PHONY: help setup demo test test-all model fetch data train export infer serve studio compare report verify quantize plan bench doctor shell image image-test image-repro verify-image bundle unbundle lint lock lock-check clean

help: ## this list
	@echo "make TARGET [KEY=value ...] [ARGS=\"key=value ...\"]        first: make demo        keys of a command: make TARGET ARGS=--help"
	@awk -F ': .*## |: ## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile
	@echo "settings:"
	@awk -F ' [?]=#  *' '/^[A-Z_]+ [?]=#/ { printf "  %-16s %s\n", $$1 "=", $$2 }' Makefile

setup: ## .venv from env.lock, every file by its hash; other commands do it when it is needed
	@docker/setup

demo: setup ## the whole way on this machine, from nothing: a small Qwen fetched, made Int4, trained, merged, compared
	@$(PY) -m train demo $(_pairs)

test: setup ## the quick tests, on the CPU, in two processes
	@$(PY) -m pytest -q -n 2 --dist loadfile $(value ARGS)

test-all: setup ## every test that this machine can run; names and counts those that it cannot
	@$(PY) -m pytest -q -m "not gpu" -p tests.support.machine $(value ARGS)
	@$(PY) -m pytest -q -m gpu -p tests.support.machine $(value ARGS)

model: ## fetch and verify a base: MODEL= an id, a folder, an archive; LIST=1: which one fits which card
	@docker/run model $(_pairs)

fetch: ## a data set of a hub to data/, so that no other command needs a network: DATA=hub:owner/name [UPDATE=1]
	@docker/run fetch $(_pairs)

data: ## check a data set, every mistake by line: DATA= [HTML=1: a page] [FIX=1: mend it] [CLEAN=] [HELD_OUT=] [OUT=]
	@docker/run data $(_pairs)

train: ## fine-tune, or continue an interrupted run: DATA= [MODEL=] [RECIPE=] [RUN=] [FROM=] [GPUS=]
	@docker/run train $(_pairs)

export: ## merged float weights, verified: RUN= [DTYPE=] [LAYOUT=] [ONTO=] [OUT=]; FORMAT=gguf for llama.cpp, Ollama
	@docker/run export $(_pairs)

infer: ## chat, or answer: [RUN= or MODEL=] [PROMPT=] [QUESTIONS= ANSWERS=] [SYSTEM=] [ENGINE=stock TRUST_REMOTE_CODE=1]
	@docker/run infer $(_pairs)

serve: ## OpenAI's API on 127.0.0.1: [RUN= names with commas, or MODEL=] [PORT=8000] [SLOTS=] [LENGTH=] [QUEUE=]
	@docker/run serve $(_pairs)

studio: ## data, training, runs and chat in the browser, on 127.0.0.1: [PORT=8080]
	@docker/run studio $(_pairs)

compare: ## ask the same questions before and after training: RUN=
	@docker/run compare $(_pairs)

report: ## one page about a run, for the browser: RUN=
	@docker/run report $(_pairs)

verify: ## check a finished run against its record: RUN= [REPLAY=1: train it again and compare]
	@docker/run verify $(_pairs)

quantize: ## make an Int4 folder, as Qwen publishes them, from a float model: MODEL= [OUT=] [METHOD=gptq DATA=] [BITS=8]
	@docker/run quantize $(_pairs)

plan: ## predict the memory of training; batch, length and checkpointing that fit a card: MODEL= GPU=8G [RECIPE=]
	@docker/run plan $(_pairs)

bench: setup ## our training step beside the published recipe's stack, on this card: [ARMS=] [MODEL=] [SHAPES=] [OUT=]
	@$(PY) -m tests.bench $(_pairs)

doctor: ## find what would fail, and how to fix it: [DATA=] [MODEL=] [RECIPE=] [GPUS=]; why a run failed: LOG=
	@docker/run doctor $(_pairs)

shell: ## bash in the container, with its mounts and without a network
	@docker/run shell $(value ARGS)

image: ## the image, from env.lock and pinned packages: [CUDA=] [TORCH=] [BASE_IMAGE=] [CA=]
	@docker/build

image-test: setup ## what the image must do, each thing done in it; GPU=1: on the GPU too, and is it the published one?
	@. docker/common.sh; docker image inspect "$$(image_name)" >/dev/null 2>&1 || docker/build
	@TEST_ON_GPU=$(GPU) $(PY) -m pytest -q -m "image and not slow" tests/image $(value ARGS)

image-repro: ## build it again from other places and at other times: is it the same, to the bit?
	@python3 tests/image/repro.py $(value ARGS)

verify-image: ## is an image, to the bit, what this checkout builds? [IMAGE=]
	@. docker/common.sh; python3 docker/verify.py "$$(image_name)"

bundle: ## one archive for hosts without a network: image, lock, source, base: [MODEL=] [OUT=]
	@docker/bundle write $(_pairs)

unbundle: ## load such an archive: BUNDLE=
	@docker/bundle load $(_pairs)

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
