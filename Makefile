# `make help` lists the targets. Everything runs in .venv, which `make setup` makes; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
STUDIES := $(patsubst conf/study/%.yaml,reproduce-%,$(wildcard conf/study/*.yaml))
SCALE ?= small
# of tools/stories.py; where they are, reproduce-router-tuning has its language half
LM ?= models/stories260K
TEXTS ?= texts/stories
TWO := -n 2 --dist loadfile  # processes, a file of tests to each
.PHONY: help setup demo test test-slow test-oldest lint benchmark benchmark-ddp frontier router-tuning-text sweep clean $(STUDIES)

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/\1\t\2/' | expand -t 15
	@echo 'also: $(STUDIES)' | fold -s -w 110

setup: $(VENV)/.ready ## make .venv with everything that is needed

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: $(PYTHON) is older than 3.10; install a newer one and say make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-cache-dir --no-compile --editable '.[dev]'
	@touch $@

demo: $(VENV)/.ready ## train, adapt and compare the variants on handwritten digits; table and picture in demo/
	$(RUN) src/demo.py

benchmark: $(VENV)/.ready ## time the variants against dense timm and ToMe; tables and pictures in results/benchmark
	$(RUN) src/benchmark.py

benchmark-ddp: $(VENV)/.ready ## time training in two processes against one, one thread each, on an idle machine
	$(RUN) tools/benchmark_ddp.py --out results/benchmark/ddp.json

reproduce-all: ## every table and figure; SCALE=small, medium or paper, DRY=1 lists the commands, ARGS="'scale.seeds=[0]'"
$(STUDIES): reproduce-%: $(VENV)/.ready
	$(RUN) src/reproduce.py study=$* scale=$(SCALE) dry=$(if $(filter 1 true yes,$(DRY)),true,false) $(ARGS)

# what trainings at small scale need, which dry=true and report_only=true do not
ifeq ($(SCALE)$(filter 1 true yes,$(DRY))$(findstring report_only=true,$(ARGS)),small)
reproduce-table9 reproduce-all: data/clothes
reproduce-router-tuning: $(if $(wildcard $(LM)/config.json),router-tuning-text)
endif

router-tuning-text: $(VENV)/.ready ## trained gates in a language model: LM=FOLDER TEXTS=FOLDER (docs/router-tuning.md)
	OMP_NUM_THREADS=1 $(RUN) tools/router_tuning_text.py --model $(LM) --texts $(TEXTS) --runs runs/router-tuning-text/$(notdir $(LM)) \
	    --out results/router-tuning-text -- schedule.epochs=3 schedule.batch_size=16

data/clothes: | $(VENV)/.ready
	$(RUN) tools/make_clothes.py --out $@

frontier: $(VENV)/.ready ## plans without training, agreement and accuracy against FLOPs and time: ARGS="run=RUN_FOLDER"
	$(RUN) src/frontier.py $(ARGS)

sweep: $(VENV)/.ready ## run a sweep file without W&B: make sweep SWEEP=sweeps/lr.yaml ARGS="data=digits"
	$(RUN) src/sweep.py $(SWEEP) $(ARGS)

test: lint ## lint, types and tests (under 15 minutes on 2 cores)
	$(VENV)/bin/pytest -m "not slow" $(TWO)

test-slow: $(VENV)/.ready ## the tests that take long
	$(VENV)/bin/pytest -m slow

test-oldest: ## the tests with the lowest versions that pyproject.toml allows, in .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) tools/lowest.py > .venv-oldest/lowest.txt
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --constraint .venv-oldest/lowest.txt --editable '.[dev]'
	.venv-oldest/bin/pytest -m "not slow" $(TWO)

lint: $(VENV)/.ready ## ruff and mypy
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

clean: ## remove what tools left behind; runs, results and data stay
	rm -rf $(VENV) .venv-oldest .pytest_cache .ruff_cache .mypy_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
