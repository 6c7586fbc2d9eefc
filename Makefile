PYTHON ?= python3
VENV ?= .venv
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := $(VENV)/bin
STAMP := $(VENV)/.agrivision-installed
BENCH_STAMP := $(VENV)/.agrivision-bench-installed
FUZZ_STAMP := $(VENV)/.agrivision-fuzz-installed
DOCS_STAMP := $(VENV)/.agrivision-docs-installed
BENCH ?= loading prepare checksums resume memory checkpoint step ddp order invariant maps watching gpu

.DEFAULT_GOAL := help
.PHONY: help install demo test test-faults storm fuzz cluster cluster-stop bench docs check audit clean

help:  ## this list
	@echo "make TARGET [VENV=.venv] [PYTHON=python3]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 16

install: $(STAMP)  ## make the virtual environment VENV with PYTHON, and install the package and its tools
	@:

# The stamp is newer than pyproject.toml as long as the dependencies have not changed. An environment
# that VENV points to and that exists already is kept; it only gets what is missing.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	@$(BIN)/python -m pip install --quiet -e '.[dev,browser]'
	@touch $@

demo: $(STAMP)  ## from invented fields to maps on this machine, in minutes; results in demo-output/
	$(BIN)/python -m launch.demo demo-output

test: $(STAMP)  ## the tests, by as many processes as there are cores, four at most
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-faults: $(STAMP)  ## all faults, which takes hours: ROWS=9,10 chooses, SAMPLE=3 draws, TIMES=3 repeats, JOBS=2 REPORT=FILE
	@for turn in $$(seq $(or $(TIMES),1)); do \
		$(BIN)/python -m pytest -m "$(if $(SAMPLE),faults and not long,faults or row)" \
			-p tests.slurm.sampling -p tests.faults_report \
			$(if $(ROWS),--rows $(ROWS)) $(if $(REPORT),--faults-report=$(REPORT)) \
			$(if $(JOBS),--numprocesses $(JOBS) --dist worksteal) \
			$(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SAMPLE_SEED),--sample-seed $(SAMPLE_SEED)) || exit 1; \
	done

storm: $(STAMP)  ## a run of the demo's kind under 20 random faults; SEED=N repeats one, SEEDS=0,1,2 several
	$(BIN)/python -m tests.storm $(if $(SEEDS),--seeds $(SEEDS),$(if $(SEED),--seed $(SEED),--fresh))

cluster: $(STAMP)  ## a real Slurm on this machine, with four invented nodes of 4 CPUs each; prints what to export
	@$(BIN)/python -m launch.cluster start

cluster-stop: $(STAMP)  ## end it, and all of its jobs
	@$(BIN)/python -m launch.cluster stop

fuzz: $(FUZZ_STAMP)  ## bad input for every reader; INPUTS=100000 each, ENGINE=hypothesis or atheris, TARGET="index jpeg"
	$(BIN)/python -m tests.fuzz.campaign --inputs $(or $(INPUTS),100000) --engine $(or $(ENGINE),both) \
		$(foreach target,$(TARGET),--target $(target)) $(if $(SEED),--seed $(SEED))

# Where there is no atheris for this Python or machine, the campaign says so and goes on with hypothesis.
$(FUZZ_STAMP): $(STAMP)
	@echo "installing the fuzzer into $(VENV)"
	@$(BIN)/python -m pip install --quiet -e '.[fuzz]' || echo "not installed: atheris is left out"
	@touch $@

bench: $(BENCH_STAMP)  ## every claim about speed beside its peers; BENCH="loading order" chooses, QUICK=1 only tries
	@for script in $(BENCH); do \
		echo "benchmarks.$$script"; \
		$(BIN)/python -m benchmarks.$$script $(if $(QUICK),--quick) || exit 1; \
	done

$(BENCH_STAMP): $(STAMP)
	@echo "installing the peers into $(VENV)"
	@$(BIN)/python -m pip install --quiet -e '.[bench]'
	@touch $@

# The theme would tell at each build that it will be kept until 2027 only; pyproject.toml knows.
docs: $(DOCS_STAMP)  ## the documentation as a site, in site/; needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

$(DOCS_STAMP): $(STAMP)
	@echo "installing what builds the site into $(VENV)"
	@$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@

check: $(STAMP)  ## style, types, the direction of imports, and what bandit finds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive agrivision launch

audit: $(STAMP)  ## known vulnerabilities of what is installed; needs the network, and says so where there is none
	@$(BIN)/python .ci/audit

clean:  ## remove caches, builds and the demo's output; the virtual environment stays
	rm -rf build dist site demo-output fuzz-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find agrivision launch benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
