"""Every command line of every page: run word for word where it needs no cloud, account, GPU or cluster.

The pages are README.md, docs/*.md and the examples' READMEs. A page's commands run one after the other in a
folder of the page's own. What makes them small stands behind the words of the page and changes none of them. RULES says
for each command what is done with it; one without a line there fails.
`DUAL_POLICY_FULL_COMMANDS=1` leaves the sizes as they are on the page (`make docs-commands`).
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from dual_policy_plugin.cli import main
from dual_policy_plugin.hydra_app.composition import compose_config, compose_hydra_node
from dual_policy_plugin.policies.loading import load_policy_from_checkpoint
from tests.docs.pages import PAGES, ROOT, blocks, commands
from tests.harness import logging_as_it_was

(MINE,) = (block.text for block in blocks(ROOT / "docs" / "quick_start.md") if block.language == "yaml")
IS_FULL = bool(os.environ.get("DUAL_POLICY_FULL_COMMANDS"))
SMALL = () if IS_FULL else (
    "trainer.total_timesteps=2048", "env.num_envs=8", "evals.episodes=8", "trainer.threads=1", "agent.hidden_size=16",
    "trainer.num_workers=1", "trainer.num_minibatches=2", "report=false", "env.num_agents=4",
    "env.episode_steps=16",
)  # fmt: skip
FOREIGN = tuple(word for word in SMALL if not word.startswith(("env.num_agents", "env.episode")))
GATES = () if IS_FULL else (
    "hydra.sweeper.episodes=32", "trainer.total_timesteps=512", "hydra.sweeper.max_attempts=1",
    "hydra.sweeper.on_fail=advance", "env.num_agents=8",
)  # fmt: skip
PREPARED = ("old", "new", "previous_run", "a", "b", "first", "second", "p1", "s1")
"""Runs that pages name without having made them."""
How = Callable[[list[str]], None]


def run(*more: str, code: int = 0) -> How:
    """The program itself, with `more` behind the words of the page."""

    def check(words: list[str]) -> None:
        try:
            got = main([*words[1:], *more])
        except SystemExit as end:  # argparse's --help
            got = int(end.code or 0)
        assert got == code

    return check


def searches(words: list[str]) -> None:
    """As `run`, with Optuna 2, which is older than what it imports and makes that warn."""
    with warnings.catch_warnings(action="ignore"):
        run(*SMALL, *(() if IS_FULL else ("hydra.sweeper.n_trials=2",)))(words)


def judge(*more: str) -> How:
    """As `run`, for a command that answers by exit code 0 or 1."""

    def check(words: list[str]) -> None:
        assert main([*words[1:], *more]) in (0, 1)

    return check


def with_mine(words: list[str]) -> None:
    """As `run`, where the reader's configs stand in a folder `mine` of theirs."""
    more = SMALL if words[1] == "train" else ()
    run(*more, f"hydra.searchpath=[file://{Path('mine').resolve()}]")(words)


def reports(words: list[str]) -> None:
    """A report, also of a sweep's folder that the page did not make: it has one job then."""
    for folder in (word for word in words if word.startswith("train_dir/")):
        if not Path(folder).exists():
            shutil.copytree("train_dir/old", f"{folder}/0")
    run()(words)


@functools.cache
def _doctor(*words: str) -> int:
    return main(["doctor", *words])


def looks(words: list[str]) -> None:
    """The doctor, once for all pages; its exit code says whether something is wrong here."""
    assert _doctor(*words[2:]) in (0, 1)


def composes(words: list[str]) -> None:
    """The config that a run or each first job of a sweep would get; a launcher's node too. Nothing is started."""
    npc = (
        "trainer.dual_policy.checkpoint_npc.uri=builtin://arena/weak"
        if "+dual_policy=checkpoint" in words
        else "seed=1"
    )
    rest = [npc if word == "..." else word for word in words[2:] if word not in ("-m", "--dry-run")]
    overrides = [re.sub(r"^([\w./]+=[^\[,{'\"]+),.*", r"\1", word) for word in rest if not word.startswith("--")]
    overrides = [word.replace("wandb://...", "wandb://team/arena/model/old:v1") for word in overrides]
    of_hydra = [word for word in overrides if word.startswith("hydra")]
    compose_config([word for word in overrides if not word.startswith("hydra")])
    for name in ("launcher", "sweeper"):
        if any(word.startswith((f"hydra/{name}=", f"hydra.{name}.")) for word in of_hydra):
            assert compose_hydra_node(overrides, name)["_target_"]


def options(depth: int) -> How:
    """`--help` of the command (its first `depth` words) knows every option of the line."""

    def check(words: list[str]) -> None:
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            run("--help")(words[:depth])
        ours = words[: words.index("--")] if "--" in words else words
        given = {word.partition("=")[0] for word in ours if word.startswith("--")}
        assert given <= set(re.findall(r"--[a-z-]+", told.getvalue()))

    return check


def completes(words: list[str]) -> None:
    """`eval "$(COMMAND)"`: the command itself."""
    run()(words[1].removeprefix("$(").removesuffix(")").split())


def sky_task(words: list[str]) -> None:
    """The YAML is one of ours, and each --env and --secret is one that it declares."""
    (path,) = (word for word in words if word.endswith(".yaml"))
    tasks = list(yaml.safe_load_all((ROOT / path).read_text("utf-8")))
    declared = {name for task in tasks for part in ("envs", "secrets") for name in (task.get(part) or {})}
    given = [words[i + 1].partition("=")[0] for i, word in enumerate(words) if word in ("--env", "--secret")]
    assert given
    assert set(given) <= declared


def launch(words: list[str]) -> None:
    """What a launch checks first: its options and its config. Nothing is sent."""
    assert words[2:4] == ["sky", "train"] or words[2] == "slurm"
    options(3)(words)
    composes(["dual-policy", "train", *words[3:]] if words[2] == "slurm" else ["dual-policy", "train", *words[4:]])


def in_makefile(words: list[str]) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text("utf-8"), re.M), words[1]


def installs(words: list[str]) -> None:
    """A package or an extra of ours, a folder of the repository, or the page's own."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    target = words[-1]
    if extra := re.fullmatch(r"(?:dual-policy-plugin|\.\./\.\.)(?:\[(\w+)\])?", target):
        assert extra[1] is None or extra[1] in known["optional-dependencies"]
    else:
        assert target == "." or (ROOT / target).exists()


def module(words: list[str]) -> None:
    """`python -m NAME --help` ends well and knows every option of the line."""
    assert words[:2] == ["python", "-m"]
    help_of = [sys.executable, "-m", words[2], "--help"]
    told = subprocess.run(help_of, cwd=ROOT, check=True, timeout=60, stdout=subprocess.PIPE, text=True).stdout
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", told))


def script(words: list[str]) -> None:
    subprocess.run(["bash", "-n", str(ROOT / words[0])], check=True, timeout=10)


def ranks(words: list[str]) -> None:
    """What torchrun or srun starts on each rank."""
    start = words.index("train")
    composes(["dual-policy", *words[start:]])


def as_shown(words: list[str]) -> None:
    """A line that shows a form, not a command: an app of the reader's, a shell's own word."""


# The first line that a command matches says what is done with it.
RULES: dict[str, How] = {
    r"make (demo|test|[a-z-]+)$": in_makefile,
    r"source \.venv/bin/activate$": as_shown,
    r"(python|diff) \w+\.py": as_shown,  # tests/examples/ runs those of the examples
    r"LOG_LEVEL=DEBUG dual-policy train run=default$": lambda words: run(*SMALL)(words[1:]),
    r"pip install ": installs,
    r"sky (jobs )?launch ": sky_task,
    r"torchrun |srun ": ranks,
    r"python -m ": module,
    r"recipes/": script,
    r"dual-policy --help$": run(),
    r"dual-policy doctor\b": looks,
    r"dual-policy watch ": options(2),
    r"dual-policy launch ": launch,
    # needs an account or a bucket
    r"dual-policy train .*(wandb=online|wandb://|s3://)": composes,
    r"dual-policy runs": options(2),
    r"dual-policy npc resolve wandb://": options(3),
    # needs a cluster or a cloud
    r"dual-policy train .*hydra/launcher=(dual_policy_slurm|skypilot|submitit_local)": composes,
    # their packages are tested with the pages that have them: tests/rl/test_real_envs.py, test_own_architecture.py
    r"dual-policy (train|evaluate) .*(my_env|berry_race|gru)": as_shown,
    r"dual-policy train .*\+sweep=.*--dry-run$": run(*SMALL, *GATES[:1], *GATES[3:]),
    r"dual-policy train .*(\+sweep=curriculum_builtin|dual_policy_curriculum)": run(*SMALL, *GATES),
    r"dual-policy train .*\+sweep=curriculum_self_play": run(*SMALL, *GATES, "hydra.sweeper.stages=2"),
    r"dual-policy train .*\+sweep=optuna_example": searches,
    r"dual-policy curriculum status ": run(),
    r"dual-policy train .*env=mettagrid": run(*FOREIGN, "env.num_agents=4", "env.size=8", "env.steps=16"),
    r"dual-policy train .*env=pettingzoo": run(*FOREIGN, "env.max_episode_steps=8"),
    r"dual-policy train --config-dir mine ": run(*SMALL),
    r"dual-policy (train|npc lock) .*\+user=mine": with_mine,
    r"dual-policy npc lock ": run(),
    r"dual-policy train .*\+dual_policy=": run(*SMALL),
    r"dual-policy train ": run(*SMALL),
    r"dual-policy evaluate ": run(*(() if IS_FULL else ("episodes=4",))),
    r"dual-policy gate ": judge(*(() if IS_FULL else ("--max-episodes", "64"))),
    r"dual-policy import ": run(),
    r"dual-policy npc resolve .*--type top": run("--filter", "dual_policy/win_rate=any"),
    r"dual-policy npc resolve ": run(),
    r"dual-policy npc inspect ": run(),
    r"dual-policy npc cache ": run(),
    r"dual-policy report ": reports,
    r"dual-policy replay ": run(),
    r'eval "\$\(dual-policy completion ': completes,
}  # fmt: skip
STAND_INS = {"FILE": "train_dir/old", "URI": "train_dir/old"}
"""What a page calls by a capital name."""
WITH_COMMANDS = [page for page in PAGES if commands(page)]


def rule_of(command: str) -> str:
    """The first pattern that fits a command."""
    for pattern in RULES:
        if re.match(pattern, command):
            return pattern
    pytest.fail(f"tests/docs/test_commands.py has no rule for: {command}")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader may have it: small runs, a config of theirs, an old .pt file."""
    folder = tmp_path_factory.mktemp("reader")
    before = Path.cwd()
    os.chdir(folder)
    try:
        npc = ("+dual_policy=checkpoint", "trainer.dual_policy.checkpoint_npc.uri=builtin://arena/weak")
        size = ("trainer.total_timesteps=8192", "trainer.checkpoint_interval=1")
        assert main(["train", "run=old", *npc, *SMALL, *size, "env.num_agents=8"]) == 0
        for name in PREPARED[1:]:
            shutil.copytree("train_dir/old", f"train_dir/{name}")
        checkpoints = folder / "train_dir/old/checkpoints"
        shutil.copy(checkpoints / "latest.safetensors", checkpoints / "model_0042.safetensors")
        torch.save(load_policy_from_checkpoint("builtin://arena/weak").state_dict(), "OLD.pt")
        mine = folder / "mine" / "user" / "mine.yaml"
        mine.parent.mkdir(parents=True)
        mine.write_text(MINE)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def _as_a_reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings of this shell; log handlers and level as they were afterwards."""
    for name in ("HYDRA_FULL_ERROR", "LOG_LEVEL", "METTA_HOURLY_COST"):
        monkeypatch.delenv(name, raising=False)
    with logging_as_it_was():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run_as_they_stand(
    page: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared, tmp_path / "reader")
    monkeypatch.chdir(tmp_path / "reader")
    for command in commands(page):
        made = re.search(r"\brun=(\w+)", command)
        if made and made[1] in PREPARED and command.startswith("dual-policy train"):
            shutil.rmtree(f"train_dir/{made[1]}", ignore_errors=True)  # the page makes it itself
        words = [STAND_INS.get(word, word) for word in shlex.split(command)]
        try:
            RULES[rule_of(command)](words)
        except AssertionError as error:
            raise AssertionError(f"{page.name}: {command}\n{error}") from error


def test_no_rule_is_left_over_and_every_page_is_read() -> None:
    used = {rule_of(command) for page in WITH_COMMANDS for command in commands(page)}
    assert set(RULES) == used
    assert len(WITH_COMMANDS) >= 12


def test_a_command_without_a_rule_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="no rule for: dual-policy dance"):
        rule_of("dual-policy dance slowly")
