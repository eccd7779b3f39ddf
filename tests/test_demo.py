"""`dual-policy demo` ends with its one line; here with a short run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dual_policy_plugin.cli import main

LINE = (
    r"demo: win rate vs builtin://arena/medium (\d\.\d\d) -> (\d\.\d\d) \[(\d\.\d\d), (\d\.\d\d)\] "
    r"over (\d+) episodes, (\d+\.\d)M learner steps in \d+ s; report (\S+)"
)


def test_demo_ends_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["trainer.total_timesteps=100000", "evals.episodes=64", "env.num_envs=16", "trainer.threads=1"]
    assert main(["demo", "--seed", "3", "--train-dir", str(tmp_path), *short]) == 0
    match = re.fullmatch(LINE, capsys.readouterr().out.splitlines()[-1])
    assert match is not None
    before, after, low, high, episodes, steps, report = match.groups()
    assert float(before) < 0.2
    assert float(low) <= float(after) <= float(high)
    assert (episodes, steps) == ("64", "0.1")
    result = json.loads(Path(report).read_text())
    assert result["evals"][0]["win_rate"] == pytest.approx(float(after), abs=0.005)
    assert result["npcs"][0]["uri"] == "builtin://arena/medium"
