# `make help` lists the targets. Every target that needs the environment makes it first.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
REQUIREMENTS := requirements-dev.txt requirements-nodeps.txt constraints.txt pyproject.toml
STAMP := .venv/.installed-$(shell cat $(REQUIREMENTS) | sha256sum | cut -c1-16)
PEERS := .venv/.peers-$(shell cat requirements-bench.txt requirements-cluster.txt $(REQUIREMENTS) | sha256sum | cut -c1-16)
BIN := .venv/bin
OUTPUT ?= results
PROFILE ?= b200

# Images of Python in Docker set it; then each process would compile every library that it imports, for 20 s.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo queue tiny-lm test test-slow test-chaos test-nightly smoke audit-results lint format benchmarks api clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ Try it
setup: $(STAMP) ## create or renew .venv from the pinned requirements

$(STAMP): $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	  || { echo "error: Python 3.11 or 3.12 expected, $(PYTHON) is another; name one: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@echo "installing the pinned requirements into .venv (a minute or two)"
	@$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -r requirements-dev.txt
	@echo "compiling the training kernels for this machine (half a minute), beside the rest of the installation"
	@$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check --no-deps -r requirements-nodeps.txt & rest=$$!; \
	  $(BIN)/python -m husai.training.compile && wait $$rest
	@if [ "$$(git rev-parse --show-toplevel 2>/dev/null)" = "$(CURDIR)" ]; then \
	  $(BIN)/pre-commit install >/dev/null || echo "pre-commit's hooks were not installed; make lint checks the same"; fi
	@rm -f .venv/.installed-*
	@touch $@
	@echo "done; next: source .venv/bin/activate"

$(PEERS): requirements-bench.txt requirements-cluster.txt $(STAMP)
	@echo "installing the libraries that the tests and benchmarks compare with, and Ray"
	@$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check --no-deps -r requirements-bench.txt
	@$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -r requirements-cluster.txt
	@rm -f .venv/.peers-*
	@touch $@

demo: setup ## the whole program at its embedded profile, to a verdict and its report; a gate that is not passed is no error
	@PATH="$(CURDIR)/$(BIN):$$PATH" PROFILE=embedded OUTPUT="$(OUTPUT)" bash scripts/experiments/run_b200_high_impact_queue.sh \
	  || { code=$$?; [ $$code -eq 1 ] || exit $$code; }

##@ Judge your SAEs: RUNBOOK.md, "Judge one SAE" and "Judge five SAEs"

##@ Run the program on your model
queue: setup ## the whole program at PROFILE (b200), to its verdict: make queue PROFILE=b200
	@PATH="$(CURDIR)/$(BIN):$$PATH" PROFILE="$(PROFILE)" OUTPUT="$(OUTPUT)" bash scripts/experiments/run_b200_high_impact_queue.sh

tiny-lm: setup ## train the language model that assets/ ships again, about an hour
	@$(BIN)/python scripts/training/train_tiny_lm.py

##@ Reproduce the evidence
audit-results: setup ## every headline figure read again from its artefact, the evidence computed again
	@$(BIN)/python scripts/analysis/verify_experiment_consistency.py

benchmarks: setup $(PEERS) ## measure again most of what docs/benchmarks reports, more than half an hour
	@$(BIN)/python benchmarks/inference_calibration.py
	@$(BIN)/python benchmarks/gate_calibration.py
	@$(BIN)/python benchmarks/feature_calibration.py
	@$(BIN)/python benchmarks/matching_speed.py
	@$(BIN)/python benchmarks/null_draws.py
	@$(BIN)/python benchmarks/training_speed.py
	@$(BIN)/python benchmarks/eval_speed.py
	@$(BIN)/python benchmarks/cross_entropy.py
	@$(BIN)/python benchmarks/probing.py
	@$(BIN)/python benchmarks/demo_profile.py
	@$(BIN)/python benchmarks/two_runs.py

##@ Change something: CONTRIBUTING.md
# What two workers start shares the cores.
test test-slow test-chaos test-nightly: export OMP_WAIT_POLICY := passive

test: setup $(PEERS) ## the test suite without its slow parts
	@$(BIN)/python -m pytest tests -n 2 --dist loadfile -m "not slow and not nightly"

test-slow: setup $(PEERS) ## whole studies, a Ray cluster
	@$(BIN)/python -m pytest tests -n 2 --dist loadfile -m "slow and not nightly"

test-chaos: setup ## the queue killed at random moments, with damaged artefacts
	@$(BIN)/python -m pytest tests/chaos -n 2 --dist worksteal -rs -m "not nightly"

test-nightly: setup $(PEERS) ## what takes longer and .ci/run does not run
	@$(BIN)/python -m pytest tests -n 2 --dist loadfile -m nightly
	@$(BIN)/python -m pytest tests/chaos -n 2 --dist worksteal -rs -m nightly

smoke: setup ## the pipeline at tiny sizes, figures checked
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/ci/smoke_pipeline.sh

lint: setup ## what pre-commit and CI check
	@$(BIN)/pre-commit run --all-files

format: setup ## rewrite the code to the project's format
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

api: setup ## write docs/api.md from docstrings
	@$(BIN)/python scripts/analysis/write_api.py

clean: ## remove what runs have made (results/), not the environment
	@find results -mindepth 1 -not -name README.md -delete
