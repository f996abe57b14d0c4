# On a fresh clone with python3 (3.11 or newer): `make demo` compares hooks, `make test` runs every test.
PYTHON ?= python3
PY := .venv/bin/python
PROJECTS := $(wildcard plugins/*/pyproject.toml contrib/*/pyproject.toml)

.PHONY: demo test lint docs

demo: .venv/installed
	.venv/bin/commhub bench --model tiny --steps 40 --repeats 10 --bandwidth 100mbit --report commhub-bench.html

test: .venv/installed
	$(PY) -m pytest -n 3 --dist worksteal $(PYTEST_ARGS) tests plugins

lint: .venv/installed
	.venv/bin/ruff check . && .venv/bin/ruff check --preview --select DOC102,DOC202,DOC403 . && .venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/commhub enum --documented --check commhub/registry/_documented_names.py
	$(PY) docs/generate_catalogue.py --check

docs: .venv/installed
	$(PY) docs/build_site.py

.venv/installed: pyproject.toml $(PROJECTS) constraints.txt
	@echo "Setting up .venv: downloads torch once, takes a minute or more."
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c constraints.txt torch 'setuptools>=77'
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]' $(PROJECTS:%/pyproject.toml=-e %)
	touch $@
