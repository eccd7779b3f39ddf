"""The Tab key, asked in real shells: commands, options and their choices, files, and what the config has."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import dual_policy_plugin
from dual_policy_plugin.commands.completing import override_candidates

ROOT = Path(dual_policy_plugin.__file__).parent.parent
URI = "trainer.dual_policy.checkpoint_npc.uri"
ASK_BASH = """
eval "$(dual-policy completion bash)"
for COMP_LINE in "$@"; do
  COMP_POINT=${#COMP_LINE} COMP_TYPE=9 COMPREPLY=()
  _python_argcomplete dual-policy
  printf '%s|' "${COMPREPLY[@]}"; echo
done
"""
ASK_ZSH = """
autoload -U compinit && compinit -u -D
eval "$(dual-policy completion zsh)"
_describe() { print -n -- "${(j:|:)${(P)2}}|" }
for BUFFER in "$@"; do CURSOR=${#BUFFER} words=(dual-policy); _python_argcomplete; echo; done
"""
ASK_FISH = """
dual-policy completion fish | source
for line in $argv; complete -C $line | string replace -r '\\t.*' '' | string join '|'; end
"""


@pytest.fixture(autouse=True)
def _program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dual-policy` on PATH, and a folder with two files as the working directory."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "dual-policy"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m dual_policy_plugin "$@"\n')
    program.chmod(0o755)
    work = tmp_path / "work"
    (work / "train_dir" / "first").mkdir(parents=True)
    (work / "old policy.pt").touch()
    monkeypatch.chdir(work)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HOME", str(work))


def ask(*lines: str, shell: Sequence[str] = ("bash", "--norc", "-c", ASK_BASH, "bash")) -> list[set[str]]:
    """What a shell offers behind each of the lines."""
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is not installed")
    done = subprocess.run([*shell, *lines], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    answers = [{word for word in line.split("|") if word} for line in done.stdout.splitlines()]
    assert len(answers) == len(lines), done.stdout
    return answers


def test_commands_and_subcommands() -> None:
    every, some, sub, nested = ask("dual-policy ", "dual-policy ev", "dual-policy npc re", "dual-policy launch s")
    assert {"train", "evaluate", "report", "replay", "doctor", "completion", "npc"} <= every
    assert some == {"evaluate "}
    assert sub == {"resolve "}
    assert nested == {"sky", "slurm"}


def test_options_and_their_choices() -> None:
    option, choice, selector, hydras, shells, dry = ask(
        "dual-policy npc resolve --t",
        "dual-policy runs --state f",
        "dual-policy npc resolve builtin://arena/weak --type la",
        "dual-policy train run=x --cfg ",
        "dual-policy completion ",
        "dual-policy train +sweep=curriculum_builtin --d",
    )
    assert option == {"--type "}
    assert choice == {"finished", "failed"}
    assert selector == {"latest "}
    assert hydras == {"job", "hydra", "all"}
    assert shells == {"bash", "zsh", "fish"}
    assert dry == {"--dry-run "}


def test_files_and_policies() -> None:
    files, builtins, new, listed = ask(
        "dual-policy npc inspect ol",
        f"dual-policy train {URI}=builtin://arena/we",
        "dual-policy gate train_",
        "dual-policy evaluate policies=[builtin://arena/weak,builtin://arena/st",
    )
    assert files == {"old\\ policy.pt "}
    assert builtins == {"//arena/weak "}  # bash takes what stands behind the last : for the word
    assert new == {"train_dir/"}
    assert listed == {"//arena/strong "}


def test_groups_and_keys_of_the_config() -> None:
    key, group, config, added, plus, own, brought = ask(
        "dual-policy train trainer.hor",
        "dual-policy train agent=",
        "dual-policy evaluate env=metta",
        "dual-policy train +dual_policy=ch",
        "dual-policy train dual_p",
        "dual-policy evaluate epis",
        "dual-policy train env=pettingzoo run=x env.i",
    )
    assert key == {"trainer.horizon="}
    assert group == {"fast", "mlp"}
    assert config == {"mettagrid "}
    assert added == {"checkpoint "}
    assert plus == {"+dual_policy="}
    assert own == {"episodes="}
    assert brought == {"env.id="}


def test_candidates_of_overrides() -> None:
    assert override_candidates("trainer.dual_policy.match") == [
        "trainer.dual_policy.matchmaking=",
        "trainer.dual_policy.matchmaking_args.",
    ]
    assert override_candidates("device=c") == ["device=cpu", "device=cuda"]
    assert override_candidates("trainer.horizon=") == ["trainer.horizon=32"]
    assert override_candidates("wandb=o", ["no=such", "agent=nope"]) == ["wandb=off", "wandb=offline", "wandb=online"]
    assert {"agent=", "+user=", "+sweep=", "run=", "trainer."} <= set(override_candidates(""))


def test_no_interpolation_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would show what a variable holds, and `${npc:...}` would fetch a policy."""
    monkeypatch.setenv("CANARY", "canary")
    for key in ("run", "hydra.run.dir", "wandb.project", "wandb.tags.0"):
        words = ["run=${oc.env:CANARY}", "wandb.project=${oc.env:CANARY}", "wandb.tags=['${oc.env:CANARY}']"]
        assert not any("canary" in one for one in override_candidates(f"{key}=", words)), key
    assert override_candidates("run=", ["run=${npc:builtin://arena/weak}"]) == []
    assert override_candidates("run=", ["run=plain"]) == ["run=plain"]
    assert override_candidates("wandb.pro", ["run=${oc.env:CANARY}"]) == ["wandb.project="]


def test_it_is_silent_whatever_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask("dual-policy nope ", "dual-policy train 'trainer.x", "dual-policy npc nope x") == [set(), set(), set()]
    monkeypatch.setenv("LOG_LEVEL", "loud")
    assert ask("dual-policy runs --st") == [set()]


def test_nothing_is_run_while_a_shell_asks() -> None:
    ask("dual-policy train run=made ", "dual-policy demo ", "dual-policy import a.pt b.safetensors ")
    assert sorted(path.name for path in Path().iterdir()) == ["old policy.pt", "train_dir"]
    assert [path.name for path in Path("train_dir").iterdir()] == ["first"]


@pytest.mark.parametrize(("line", "limit_s"), [("dual-policy npc re", 0.3), ("dual-policy train trainer.hor", 1.0)])
def test_it_is_fast(line: str, limit_s: float) -> None:
    environment = os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1"}
    subprocess.run(["dual-policy"], env=environment, capture_output=True, check=False)  # compiles what was changed
    taken_s = []
    for _ in range(3):  # the fastest: a shared processor's seconds are longer at times
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(["dual-policy"], env=environment, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken_s) < limit_s, taken_s


def test_zsh() -> None:
    shell = ("zsh", "-f", "-c", ASK_ZSH, "zsh")
    sub, choice, key = ask("dual-policy npc re", "dual-policy runs --state f", "dual-policy train agent=", shell=shell)
    assert {word.partition(":")[0] for word in sub} == {"resolve"}
    assert {word.partition(":")[0] for word in choice} == {"finished", "failed"}
    assert {word.partition(":")[0] for word in key} == {"agent=fast", "agent=mlp"}


def test_fish() -> None:
    shell = ("fish", "--no-config", "-c", ASK_FISH)
    sub, choice, key = ask("dual-policy npc re", "dual-policy runs --state f", "dual-policy train agent=", shell=shell)
    assert sub == {"resolve"}
    assert choice == {"finished", "failed"}
    assert key == {"agent=fast", "agent=mlp"}
