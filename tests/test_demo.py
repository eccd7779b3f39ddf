"""`dual-policy demo` ends with its one line; here with a short run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dual_policy_plugin.cli import main
from dual_policy_plugin.demo import demo
from dual_policy_plugin.errors import ConfigError

LINE = (
    r"demo: win rate vs builtin://arena/medium (\d\.\d\d) -> (\d\.\d\d) \[(\d\.\d\d), (\d\.\d\d)\] "
    r"over (\d+) episodes, (\d+\.\d)M learner steps in \d+ s; report (\S+), replay (\S+)"
)


@pytest.mark.slow
def test_demo_ends_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["trainer.total_timesteps=100000", "evals.episodes=64", "env.num_envs=16", "trainer.threads=1"]
    assert main(["demo", "--seed", "3", "--train-dir", str(tmp_path), *short]) == 0
    match = re.fullmatch(LINE, capsys.readouterr().out.splitlines()[-1])
    assert match is not None
    before, after, low, high, episodes, steps, report, replay = match.groups()
    assert float(before) < 0.2
    assert float(low) <= float(after) <= float(high)
    assert (episodes, steps) == ("64", "0.1")
    assert Path(report).name == "report.html"
    assert Path(replay) == Path(report).with_name("replay.html")
    assert "model_" in Path(replay).read_text()
    result = json.loads(Path(report).with_name("result.json").read_text())
    assert result["evals"][0]["win_rate"] == pytest.approx(float(after), abs=0.005)
    assert result["npcs"][0]["uri"] == "builtin://arena/medium"


def test_demo_names_whom_it_played_against(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["trainer.total_timesteps=1", "evals.episodes=8", "env.num_envs=8", "trainer.threads=1"]
    elsewhere = tmp_path / "elsewhere"  # the user's words stand last, and win
    assert demo(1, tmp_path, [*short, "evals.opponents=[builtin://arena/random]", f"train_dir={elsewhere}"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("demo: win rate vs builtin://arena/random ")
    assert Path(line.rpartition("replay ")[2]).is_relative_to(elsewhere)


@pytest.mark.parametrize(
    ("override", "message"),
    [("evals.episodes=0", r"evals\.episodes=0"), ("trainer.dual_policy.training_agents_pct=1", "none plays")],
)
def test_demo_without_anything_to_measure_is_refused_before_it_trains(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        demo(1, tmp_path, [override])
    assert not list(tmp_path.rglob("*.jsonl"))
