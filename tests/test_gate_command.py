"""`dual-policy gate`: exit codes and the line for every outcome, fair on unequal sides, and one line for bad input."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dual_policy_plugin.cli import main
from tests.harness import logging_as_it_was

FORAGER, RANDOM = "builtin://arena/forager", "builtin://arena/random"
SMALL = [
    "env.num_agents=4", "env.height=8", "env.width=8", "env.mines=2", "env.altars=2", "env.walls=0",
    "env.episode_steps=32", "env.num_envs=32", "trainer.threads=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own as cwd; log handlers and level as they were."""
    monkeypatch.chdir(tmp_path)
    with logging_as_it_was():
        yield
    assert list(tmp_path.iterdir()) == []


def gate(capsys: pytest.CaptureFixture[str], new: str, old: str, *words: str) -> tuple[int, str]:
    """The exit code, and the one line on standard output (of an error: on standard error)."""
    code = main(["gate", new, "--not-weaker-than", old, *SMALL, *words])
    said = capsys.readouterr()
    (line,) = (said.err if code == 2 else said.out).splitlines()
    return code, line


def test_the_stronger_passes_and_the_weaker_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = gate(capsys, FORAGER, RANDOM, "--max-episodes", "128")
    assert code == 0
    found = re.fullmatch(
        rf"not weaker: {FORAGER} wins (0\.\d{{3}}|1\.000) \[(0\.\d{{3}}), ([01]\.\d{{3}})\] against {RANDOM} in 128 "
        r"episodes, log likelihood ratio (\d+\.\d\d) \(passes at 3\.00, fails at -3\.00\)",
        line,
    )
    assert found is not None, line
    assert 0.9 < float(found[1]) <= float(found[3])
    assert float(found[2]) > 0.8
    code, line = gate(capsys, RANDOM, FORAGER, "--max-episodes", "128")
    assert code == 1
    assert line.startswith(f"weaker: {RANDOM} wins 0.0")


def test_a_policy_is_not_weaker_than_itself_and_mirrored_games_are_half_as_many(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # each pair of mirrored games is drawn: 0.5 (log(0.5 / 0.3) + log(0.5 / 0.7)) = 0.0872; log 20 needs 35 pairs
    code, line = gate(capsys, RANDOM, RANDOM, "--margin=0.2", "--max-episodes=64")
    assert (code, line.partition(":")[0]) == (1, "undecided")
    assert "wins 0.500 " in line
    assert "in 64 episodes, log likelihood ratio 2.79" in line
    code, line = gate(capsys, RANDOM, RANDOM, "--margin=0.2", "--max-episodes=128")
    assert (code, line.partition(":")[0]) == (0, "not weaker")
    assert "in 128 episodes, log likelihood ratio 5.58" in line


def test_unequal_sides_are_played_in_both_orders(capsys: pytest.CaptureFixture[str]) -> None:
    """Two seats against one: whoever has more of them is the better off, and each has them half of the games."""
    code, line = gate(capsys, FORAGER, FORAGER, "env.num_agents=3", "--margin=0.2", "--max-episodes=128")
    assert code == 0
    assert "wins 0.500 " in line
    code, line = gate(capsys, RANDOM, FORAGER, "env.num_agents=3", "--max-episodes=128")
    assert (code, line.partition(":")[0]) == (1, "weaker")


def test_the_seats_may_be_said_without_switching_an_npc_on(capsys: pytest.CaptureFixture[str]) -> None:
    """One seat against three; other words of the node are still asked about."""
    games = ("env.episode_steps=8", "--max-episodes=128")  # too short for all of them to be won
    seats = ("trainer.dual_policy.training_agents_pct=0.25", "trainer.dual_policy.assignment=last")
    said = gate(capsys, FORAGER, RANDOM, *games, *seats)
    assert said == gate(capsys, FORAGER, RANDOM, *games, *seats, "trainer.dual_policy.enabled=false")
    assert said[0] == 0
    assert said != gate(capsys, FORAGER, RANDOM, *games)
    code, line = gate(capsys, FORAGER, RANDOM, *seats, "trainer.dual_policy.checkpoint_npc.uri=builtin://arena/weak")
    assert code == 2
    assert "but the NPC is not switched on" in line


def test_looks_are_fresh_games_and_the_seed_repeats_them(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dual_policy_plugin.commands.gate.EPISODES_PER_LOOK", 64)
    caplog.set_level(logging.INFO)
    words = ("env.episode_steps=8", "--margin=0.02", "--max-episodes=640")
    lines = [gate(capsys, FORAGER, RANDOM, *words, *more)[1] for more in ((), ("--seed=1",), ("--seed", "2"))]
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("look ")]
    looks = [re.findall(r"look (\d+): ([\d.]+) wins in 64 episodes", look)[0] for look in told]
    size = len(looks) // 3
    assert size >= 2
    assert [number for number, _ in looks] == [str(1 + i) for i in range(size)] * 3
    assert len({wins for _, wins in looks[:size]}) >= 2
    assert looks[:size] == looks[size : 2 * size] != looks[2 * size :]
    assert lines[0] == lines[1] != lines[2]  # the config's seed is 1
    assert f"in {64 * size} episodes" in lines[0]  # and it stopped when it was sure


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--margin", "0"], "error: argument --margin: '0' is not between 0 and 0.5; see `dual-policy gate --help`"),
        (["--margin=0.5"], "error: argument --margin: '0.5' is not between 0 and 0.5; "),
        (["--margin=nan"], "error: argument --margin: 'nan' is not between"),
        (["--alpha=0.7"], "error: argument --alpha: '0.7' is not between"),
        (["--beta=x"], "error: argument --beta: 'x' is not between"),
        (["--seed=-1"], "error: argument --seed: '-1' is no seed; use a whole number from 0 to 2147483647"),
        (["--max-episodes=0"], "error: argument --max-episodes: '0' is no count of 1 or more"),
        # 28.43 wins' worth of log(0.5 / 0.45) are log 20, in twice as many mirrored episodes
        (
            ["--max-episodes=56"],
            "error: --max-episodes=56 can never pass, not even by winning all of them; use at least 57, or a larger",
        ),
        (["env.num_agent=4"], "error: env.num_agent is not a known key; did you mean env.num_agents?"),
        (["trainer.dual_policy.training_agents_pct=1"], "error: trainer.dual_policy.training_agents_pct=1"),
        (["evals.episodes=8"], "error: evals.episodes=8 is not read here; use --max-episodes"),
        (["nonsense"], "error: 'nonsense' cannot be read; an override is key=value"),
        (["env.num_agents=1"], "error: env.num_agents=1 is not possible; use a value from 2 to 64"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = gate(capsys, RANDOM, RANDOM, *words)
    assert code == 2
    assert said.startswith(line)


def test_policies_that_cannot_be_had_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = gate(capsys, "gone.safetensors", RANDOM)
    assert code == 2
    assert "gone.safetensors" in line
    code, line = gate(capsys, RANDOM, "builtin://arena/nobody")
    assert code == 2
    assert "builtin://arena/nobody" in line
    assert main(["gate", "--not-weaker-than", RANDOM, "env=arena", RANDOM]) == 2
    assert capsys.readouterr().err.startswith("error: env=arena stands where NEW belongs; write the policy first")
    assert main(["gate", RANDOM]) == 2
    assert capsys.readouterr().err == (
        "error: the following arguments are required: --not-weaker-than; see `dual-policy gate --help`\n"
    )
