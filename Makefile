# Two commands for a newcomer: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: help setup demo test check format bench builtins fuzz

help:
	@echo "make demo     train against a built-in opponent for a minute and see who wins"
	@echo "make test     all tests"
	@echo "make check    format, lint, types, import floors, fast tests"
	@echo "make fuzz     ten thousand malformed and all hostile policy files"
	@echo "make bench    speed of env and trainer, as tables"

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say which with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,wandb,mettagrid,pettingzoo]'
	@touch $@

demo: setup
	@$(BIN)/dual-policy demo

test: setup
	$(BIN)/pytest -n 2 --dist worksteal -q

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist worksteal -q -m 'not slow'

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python -m benchmarks.bench_env
	$(BIN)/python -m benchmarks.bench_mixed

builtins: setup
	$(BIN)/python -m benchmarks.make_builtins

fuzz: setup
	$(BIN)/python -m tests.security.fuzz --count 10000
	$(BIN)/python -m tests.security.fuzz --count 100 --hidden-size 2304
	$(BIN)/python -m tests.security.fuzz --hostile
