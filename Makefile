# Two commands for a newcomer: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3.11
BIN := .venv/bin

# where `make bench-gpu` writes its tables and JSON files
OUT ?= benchmarks/results/gpu

.PHONY: help setup setup-cluster setup-browser demo test test-gpu lint check format bench bench-gpu builtins fuzz drill drill-curriculum drill-sky oracle bench-curriculum docs docs-reference docs-commands

help:
	@echo "make demo     train against a built-in opponent for a minute and see who wins"
	@echo "make test     all tests"
	@echo "make setup-cluster   what their parts on Slurm and SkyPilot need; as root, on Debian"
	@echo "make setup-browser   a Chromium for their parts on pages, zsh and fish for completion; as root, on Debian"
	@echo "make test-gpu kernels, graphs and whole runs on a GPU, beside their plain twins"
	@echo "make lint     format, lint, types, import floors"
	@echo "make check    the same, and the fast tests"
	@echo "make fuzz     ten thousand malformed and all hostile policy files"
	@echo "make drill    a run killed 200 times, a quarter of them inside a save, ends as one that was not; ten minutes"
	@echo "make drill-curriculum   a curriculum sweep killed at 20 random moments ends as one that was not"
	@echo "make drill-sky   the scripts of a SkyPilot node on this machine, with a real installation"
	@echo "make oracle   poker, where the best answer to the NPC can be worked out: learners must find it; half an hour"
	@echo "make bench-curriculum   does a ladder of NPCs help? the table of docs/results.md; half an hour"
	@echo "make docs     the documents as a site in docs/_build/html"
	@echo "make docs-reference   the pages that are made from the source: configuration, errors"
	@echo "make docs-commands    every command of the documents at its full size; hours"
	@echo "make bench    speed of env and trainer, as tables; under six minutes"
	@echo "make bench-gpu [OUT=folder]   the same on a GPU with 65,536 agents, and a profile; tables and JSON in the folder"

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say which with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,mettagrid,pettingzoo,tensorboard,wandb]'
	@touch $@

setup-cluster: setup
	tests/install.sh setup-cluster "munged slurmctld slurmd srun sbatch squeue scancel" "slurm-wlm munge"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-sky.txt

setup-browser: setup
	tests/install.sh setup-browser "chromium zsh fish" "chromium fonts-dejavu-core zsh fish"

demo: setup
	@$(BIN)/dual-policy demo

test: setup
	$(BIN)/pytest -n 2 --dist worksteal -q

# alone: the other tests hide the GPU and switch Triton's interpreter on
test-gpu: setup
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: torch sees no CUDA device here")'
	env -u TRITON_INTERPRET $(BIN)/pytest -q -s tests/gpu/gpu_checks.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(BIN)/pytest -n 2 --dist worksteal -q -m 'not slow'

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python -m benchmarks.bench_env
	$(BIN)/python -m benchmarks.bench_mixed
	$(BIN)/python -m benchmarks.bench_pool

bench-curriculum: setup
	$(BIN)/python -m benchmarks.bench_curriculum

# bash, because its pipefail lets a failed bench fail the target although `tee` does not
bench-gpu: SHELL := bash
bench-gpu: .SHELLFLAGS := -o pipefail -c
bench-gpu: setup
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make bench-gpu: torch sees no CUDA device here")'
	@mkdir -p "$(OUT)"
	$(BIN)/python -m benchmarks.bench_env --device cuda --num-envs 8192 --json "$(OUT)/env.json" | tee "$(OUT)/env.txt"
	$(BIN)/python -m benchmarks.bench_mixed --device cuda --num-envs 8192 --json "$(OUT)/mixed.json" | tee "$(OUT)/mixed.md"
	$(BIN)/python -m benchmarks.bench_pool --device cuda --num-envs 8192 | tee "$(OUT)/pool.md"
	$(BIN)/python -m benchmarks.profile_iteration --device cuda --num-envs 8192 --json "$(OUT)/profile.json" \
		| tee "$(OUT)/profile.md"

builtins: setup
	$(BIN)/python -m benchmarks.make_builtins

fuzz: setup
	$(BIN)/python -m tests.security.fuzz --count 10000
	$(BIN)/python -m tests.security.fuzz --count 100 --hidden-size 2304
	$(BIN)/python -m tests.security.fuzz --hostile

drill: setup
	$(BIN)/python -m tests.resume.drill --calls 1
	$(BIN)/python -m tests.resume.drill --kills 200

drill-curriculum: setup
	$(BIN)/python -m tests.curriculum.drill --kills 20

drill-sky: setup
	$(BIN)/python -m tests.launch.drill_sky

docs: setup
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

docs-reference: setup
	$(BIN)/python -m docs.generate

docs-commands: setup
	DUAL_POLICY_FULL_COMMANDS=1 $(BIN)/pytest -q --timeout 7200 tests/docs/test_commands.py

oracle: setup
	$(BIN)/python -m tests.oracle.run
