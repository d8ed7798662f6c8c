# Every target does its own set-up: `make demo` and `make test` work on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DECLARED := pyproject.toml constraints.txt $(wildcard requirements/*.txt)

.DEFAULT_GOAL := help
.PHONY: help demo serve test lint bench-pack bench-tune bench-memory bench-cores bench-gpu bench-plan bench-queue \
	bench-throughput bench-stops bench-fairness calibrate sensitivity chaos profile fig3 solo soak units table3 numerics image format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not ((3, 11) <= v <= (3, 13)) and f"needs Python 3.11 to 3.13, not {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# Two sets: what a user needs, and what a developer adds.
$(VENV)/.installed: $(DECLARED) | $(VENV)/bin/python
	$(PIP) install --quiet -c constraints.txt -e '.[service,cluster,postgres,data]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[service,cluster,postgres,data,dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed requirements/bench.txt
	$(PIP) install --quiet -c constraints.txt -r requirements/bench.txt
	@touch $@

demo: $(VENV)/.installed ## train Fig. 4a (SGD) on DIGITS through the service: out/fig4a-sgd.png
	$(BIN)/python examples/demo.py --out out

serve: $(VENV)/.installed ## start the service on this machine
	$(BIN)/ddpsweep serve

# Two processes, a file to each: half of the time goes into waiting for what was killed to come back.
test: lint ## lint, types, import contracts and all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-dev ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.13
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed-dev ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-pack: $(VENV)/.installed ## time packs against plain PyTorch loops, torch.func and the machine (minutes)
	$(BIN)/python -m benchmarks.pack

bench-tune: $(VENV)/.installed-bench ## a panel of Fig. 4a through the service against Ray Tune (minutes)
	$(BIN)/python -m benchmarks.tune

bench-memory: $(VENV)/.installed ## the memory of runs against the planner's estimate
	$(BIN)/python -m benchmarks.memory

bench-cores: $(VENV)/.installed ## how packs, processes and threads fill the cores
	$(BIN)/python -m benchmarks.cores

bench-plan: $(VENV)/.installed ## time the planning of grids of up to 1,000,000 runs
	$(BIN)/python -m benchmarks.planning

bench-queue: $(VENV)/.installed-dev ## submit 100,000 runs, claim packs with 1,000,000 stored (minutes)
	$(BIN)/python -m benchmarks.queue

bench-throughput: $(VENV)/.installed-dev $(VENV)/.installed-bench ## runs a second, against Ray Tune and Optuna (minutes)
	$(BIN)/python -m benchmarks.throughput

bench-stops: $(VENV)/.installed ## how soon sweeps stop that are paused or cancelled
	$(BIN)/python -m benchmarks.stops

calibrate: $(VENV)/.installed-dev ## search the settings of Fig. 4a and Tables 6 to 8 by the baselines alone (half an hour)
	$(BIN)/python -m benchmarks.calibrate

sensitivity: $(VENV)/.installed-dev ## count Fig. 4a's and Fig. 9's better cells for other forms of DDPNOpt (minutes)
	$(BIN)/python -m benchmarks.sensitivity

bench-fairness: $(VENV)/.installed ## simulate the fair share: 10,000 sweeps on 1,000 devices
	$(BIN)/python -m benchmarks.fairness

chaos: $(VENV)/.installed-dev ## kill, stop and starve everything, at full length (an hour or two)
	DDPSWEEP_CHAOS=full $(BIN)/python -m pytest -s -m chaos --timeout 7200

bench-gpu: $(VENV)/.installed ## packs of up to 10,000 runs on a GPU, against one run at a time
	$(BIN)/python -m benchmarks.gpu

profile: $(VENV)/.installed ## where the time of the tensor path goes
	$(BIN)/python -m benchmarks.profile

fig3: $(VENV)/.installed ## time and memory of a step against its size (Fig. 3, Table 4): out/fig3.png
	$(BIN)/python -m benchmarks.fig3

solo: $(VENV)/.installed ## train the 200 runs of Fig. 4a packed and one at a time, compare every bit (minutes)
	$(BIN)/python -m benchmarks.solo

soak: $(VENV)/.installed ## run sweeps for SOAK_MINUTES (60) while things are killed, paused and cancelled
	$(BIN)/python -m benchmarks.soak --minutes $(or $(SOAK_MINUTES),60)

units: $(VENV)/.installed ## train Fig. 4a's SGD panel under every choice of units, scale and safeguard (minutes)
	$(BIN)/python -m benchmarks.units

table3: $(VENV)/.installed ## train every method of Table 3 on WINE, DIGITS and MNIST (minutes; docs/datasets.md)
	$(BIN)/python -m benchmarks.table3

numerics: build/numerics/bin/python ## test ddpnopt alone, beside torch, numpy, scipy and scikit-learn only
	build/numerics/bin/python -m pytest tests/ddpnopt tests/reference

build/numerics/bin/python: $(DECLARED)
	$(PYTHON) -m venv --clear build/numerics
	$@ -m pip install --disable-pip-version-check --quiet -c constraints.txt . pytest pytest-timeout hypothesis

image: ## build every stage of the Dockerfile and try the images out
	deploy/image

clean: ## remove what the other targets made
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
