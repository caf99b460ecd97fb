# make demo   train a teacher and three students on the built-in task; prints a table
# make test   run the test suite
# Both create .venv and fetch the built-in data first; a second run reuses what is there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install data demo test lint clean

help:
	@sed -n '1,3s/^# //p' Makefile
	@echo "also: make install, make data, make lint, make clean"

$(STAMP): setup.py pyproject.toml constraints.txt tools/setup_env.sh
	@PYTHON=$(PYTHON) VENV=$(VENV) bash tools/setup_env.sh
	@touch $(STAMP)

install: $(STAMP)

data: $(STAMP)
	@$(BIN)/fsd-fast fetch

demo: data
	@$(BIN)/fsd-fast demo --output_dir runs/demo

test: data
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup tests

lint: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache build dist runs *.egg-info
