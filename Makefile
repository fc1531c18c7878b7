# `make quickstart` and `make test` do all the set-up on a fresh machine: a virtual environment, then the job.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# cpu: PyTorch without CUDA's libraries; empty: as on PyPI
TORCH ?=
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Bytecode is kept, whatever the environment says: runs and tests start many processes, which would all compile.
export PYTHONDONTWRITEBYTECODE =

.PHONY: quickstart test lint install clean

quickstart: install configs/quickstart/build/settings.json
	$(BIN)/python -m pipeline run configs/quickstart/recipe.yaml

configs/quickstart/build/settings.json: configs/quickstart/make_models.py | install
	$(BIN)/python $<
	touch $@

test: install
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt infra/install.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PYTHON=$(BIN)/python infra/install.sh torch $(TORCH)
	PYTHON=$(BIN)/python infra/install.sh project dev --editable
	touch $@

clean:
	rm -rf $(VENV) store configs/quickstart/build
