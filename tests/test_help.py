"""The help of every command fits a screen, and every example in it works as it stands."""

from __future__ import annotations

import argparse
import functools
import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.utils import get_args_parser

from dual_policy_plugin import cli
from dual_policy_plugin.cli import main
from dual_policy_plugin.hydra_app.composition import compose_config
from dual_policy_plugin.hydra_app.overrides import CONFIG_DIR
from tests.harness import logging_as_it_was

HELPS = [
    "", "train", "import", "demo", "npc", "npc resolve", "npc inspect", "npc lock", "npc cache", "runs", "evaluate",
    "gate", "curriculum", "curriculum status", "launch", "launch sky", "launch slurm", "watch", "report", "replay",
    "doctor", "completion",
]  # fmt: skip
MAX_ROWS, MAX_COLUMNS = 40, 80
PARSE_ONLY = (
    "demo",
    "train",
    "import",
    "watch",
    "launch",
    "report",
    "replay",
    "evaluate",
    "gate",
    "curriculum",
    "doctor",
)
"""Take minutes, launch something, need a run, or are tried elsewhere."""
NETWORK = ("runs", "wandb://", "train_dir/")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOG_LEVEL", raising=False)
    with logging_as_it_was():
        yield


@functools.cache
def help_of(command: str, columns: int = MAX_COLUMNS) -> list[str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("COLUMNS", str(columns))
        assert main([*command.split(), "--help"]) == 0
    assert err.getvalue() == ""
    return out.getvalue().rstrip("\n").splitlines()


def examples_of(lines: list[str]) -> list[list[str]]:
    """The words behind `dual-policy` of each example."""
    below = "\n".join(lines[lines.index("examples:") + 1 :]).replace("\\\n", " ")
    lines = [line for line in below.splitlines() if re.match(r"\s+\S", line)]
    found = [shlex.split(line.split("  #")[0].strip()) for line in lines]
    shells = {"eval": ["completion", "bash"]}  # eval "$(dual-policy completion bash)"
    return [shells.get(words[0]) or words[1 : words.index("|") if "|" in words else None] for words in found]


@pytest.mark.parametrize("command", HELPS)
def test_it_fits_a_screen_and_has_an_example(command: str) -> None:
    lines = help_of(command)
    assert len(lines) <= MAX_ROWS
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []
    assert lines[0].startswith(f"usage: dual-policy {command}".rstrip())
    assert examples_of(lines)


class _ParsedError(Exception):
    """Carries what a parser made of the words."""


@pytest.mark.parametrize("command", HELPS)
def test_every_example_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examples_of(help_of(command))
    parse, parse_mixed = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_intermixed_args

    def stop(self: argparse.ArgumentParser, *words: Any) -> None:
        raise _ParsedError(parse(self, *words))

    def stop_mixed(self: argparse.ArgumentParser, *words: Any) -> None:
        raise _ParsedError(parse_mixed(self, *words))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", stop_mixed)
    parsed = []
    for words in found:
        with pytest.raises(_ParsedError) as caught:
            main(words)
        parsed.append(caught.value.args[0])
    monkeypatch.undo()
    for words, args in zip(found, parsed, strict=True):
        if words[0] in ("train", "demo", "launch") and "sweep" not in str(words):
            overrides = [word for word in args.overrides if not word.startswith("hydra")]
            config, _ = compose_config(overrides)
            assert config.run in ("default", "first", "alone")


def test_the_examples_that_need_nothing_run(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    ran = []
    for command in HELPS:
        for words in examples_of(help_of(command)):
            if words[0] in PARSE_ONLY or any(part in word for part in NETWORK for word in words):
                continue
            assert main(words) == 0, words
            assert capsys.readouterr().out or words[:3] in (["npc", "cache", one] for one in ("ls", "prune", "verify"))
            ran.append(" ".join(words[:2]))
    assert {"npc resolve", "npc inspect", "npc lock", "npc cache", "completion bash"} <= set(ran)


def test_the_top_help_has_each_command_once() -> None:
    grouped = [name for names in cli._GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(cli._COMMANDS)
    names = [match[1] for line in help_of("") if (match := re.match(r"  (\w+) +\w", line))]
    assert names == grouped


def test_the_help_of_train_names_every_config_and_every_flag_exists() -> None:
    text = "\n".join(help_of("train"))
    for group in ("agent", "env", "wandb"):
        for file in (CONFIG_DIR / group).glob("*.yaml"):
            assert re.search(rf"{group}=\S*\b{file.stem}\b", text), f"{group}={file.stem}"
    for name in ("checkpoint", "self_play", "off"):
        assert re.search(rf"\+dual_policy=\S*\b{name}\b", text)
    known = {*get_args_parser()._option_string_actions, "--dry-run"}
    assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text)) <= known
    keys = re.findall(r"^  ((?:trainer\.|env\.|evals\.|run|seed|device)[\w.]*)=", text, re.MULTILINE)
    for key in keys:
        compose_config([f"{key}={'auto' if key == 'device' else 'x' if key == 'run' else 1}"])
    assert len(keys) >= 6


def test_a_narrow_terminal_gets_narrow_help() -> None:
    lines = help_of("gate", 60)
    before = lines[: lines.index("examples:")]
    assert max(map(len, before[1:])) <= 60
