# make demo   train a teacher and three students on the built-in task; prints a table
# make test   run the test suite
# Both create .venv and fetch the built-in data first; a second run reuses what is there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs-installed
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install data demo test fuzz test-distributed test-faults test-triton load audit lint docs kernels-report mutate \
	bench results clean

help:
	@sed -n '1,3s/^# //p' Makefile
	@echo "also: make install, make data, make lint, make docs, make clean, make kernels-report, make mutate, make bench,"
	@echo "      make fuzz, make test-faults, make test-distributed, make load, make audit, make results,"
	@echo "      make test-triton TRITON=3.7.1"

$(STAMP): setup.py pyproject.toml constraints.txt tools/setup_env.sh
	@PYTHON=$(PYTHON) VENV=$(VENV) bash tools/setup_env.sh
	@touch $(STAMP)

install: $(STAMP)

data: $(STAMP)
	@$(BIN)/fsd-fast fetch

demo: data
	@$(BIN)/fsd-fast demo --output_dir runs/demo

# What starts the launcher runs alone afterwards: those tests share ports, cores and a C++ build.
test: data
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not launcher and not slow" tests
	@$(BIN)/python -m pytest -m "launcher and not slow" tests

# More than 10,000 cases: shapes of the losses, flags, and bytes of files. make test runs one in 25 of them.
fuzz: data
	@FSD_FUZZ=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/fuzz

# The same losses on every layout of processes; under 20 minutes on 2 cores.
test-distributed: data
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed

# Kills, full disks, damaged files and all else that docs/faults.md lists; under 20 minutes on 2 cores.
test-faults: data
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "faults and not launcher" tests
	@$(BIN)/python -m pytest -m "faults and launcher" tests

# A memory of 400,000 samples and a run of 10,000 steps, against limits of their memory; docs/benchmarks.md has the time.
load: data
	@$(BIN)/python -m benchmarks load --check

# Known vulnerabilities of what is installed. Exit status 3: the database could not be asked about every package.
audit: $(STAMP)
	@test -x $(VENV)-audit/bin/pip-audit || \
	  { $(PYTHON) -m venv $(VENV)-audit && $(VENV)-audit/bin/pip install -q pip-audit; }
	@$(BIN)/python -m tools.audit $(VENV)-audit/bin/pip-audit

# The interpreter tests of the Triton kernels under another release of triton, in an environment of its own.
TRITON ?= 3.7.1
test-triton:
	@test -x $(VENV)-triton-$(TRITON)/bin/python || $(PYTHON) -m venv $(VENV)-triton-$(TRITON)
	@$(VENV)-triton-$(TRITON)/bin/pip install -q torch==2.13.0
	@$(VENV)-triton-$(TRITON)/bin/pip install -q triton==$(TRITON) "numpy<2.4" pytest hypothesis
	@$(VENV)-triton-$(TRITON)/bin/python -m pytest -m triton tests/kernels --ignore tests/kernels/test_cost.py

# Machine code of the Triton kernels, for GPUs that are not here. The first time takes about 70 minutes: 40 to compile
# and 30 to count bytes. Later runs reuse both.
kernels-report: $(STAMP)
	@$(BIN)/python -m benchmarks kernels-report

# Breaks the Triton kernels one change at a time and counts the changes that the tests catch.
mutate: $(STAMP)
	@$(BIN)/python -m benchmarks mutate

# Measures everything that this machine can, in 20 minutes at most; docs/benchmarks.md says how to read it.
bench: data
	@$(BIN)/pip install -q --no-deps -r benchmarks/requirements.txt
	@$(BIN)/python -m benchmarks bench

# Students of every method and task, and their learning curves: docs/results/*.yaml. Hours on two cores; a second run goes on
# where the first one stopped, also from the rows that are in docs/results.
results: data
	@for name in students_lr students students_8000 learning_curve; do \
	  mkdir -p runs/results/$$name && \
	  { test -e runs/results/$$name/results.csv || ! test -e docs/results/$$name.csv || \
	    cp docs/results/$$name.csv runs/results/$$name/results.csv; } && \
	  $(BIN)/fsd-fast sweep docs/results/$$name.yaml --output_dir runs/results/$$name --keep_models false \
	    --jobs $(WORKERS) && \
	  cp runs/results/$$name/results.csv docs/results/$$name.csv && \
	  $(BIN)/fsd-fast table docs/results/$$name.csv --best_on_heldout true --format markdown \
	    --output_file docs/results/$$name.md && \
	  $(BIN)/fsd-fast table docs/results/$$name.csv --best_on_heldout true --scored_on heldout --format markdown \
	    --output_file docs/results/$${name}_heldout.md || exit 1; \
	done
	@$(BIN)/python -m tools.learning_curve docs/results/learning_curve.csv docs/results/learning_curve.png

lint: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# The site, in build/site. It loads nothing from the network; a broken link or a missing docstring is an error.
$(DOCS_STAMP): $(STAMP)
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	@touch $(DOCS_STAMP)

docs: $(DOCS_STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "written: build/site/index.html"

clean:
	rm -rf $(VENV) .cache build dist runs *.egg-info
