"""A run on several ranks goes on where it was stopped; on another number of ranks with new episodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.ranks.conftest import Ended, RunRanks
from tests.ranks.programs import ITERATION

STATE = "runs/several/state/training.safetensors"
KEPT = ("metrics.jsonl", "state/training.safetensors", "checkpoints/latest.safetensors")
"""What must be the same to the byte."""


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def codes(ended: list[Ended]) -> list[int]:
    return [one.code for one in ended]


def kept(path: Path) -> dict[str, bytes]:
    return {name: (path / "runs/several" / name).read_bytes() for name in KEPT}


def steps(path: Path) -> list[float]:
    lines = (path / "runs/several/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["charts/agent_step"] for line in lines]


@pytest.mark.parametrize(
    ("world", "how", "expected", "settings"),
    [
        (2, "killed", [75, -9], {"pool": True, "checkpoint_interval": 1}),
        slow(2, "killed", [75, -9], {"checkpoint_interval": 100, "state_interval_s": 0.001}),
        slow(2, "asked to stop", [-15, -15], {"pool": True, "checkpoint_interval": 3}),
        slow(4, "asked to stop", [-15, -15, -15, -15], {"checkpoint_interval": 100}),
    ],
)
def test_a_run_goes_on_as_if_it_had_not_been_stopped(
    run_ranks: RunRanks, tmp_path: Path, world: int, how: str, expected: list[int], settings: dict[str, Any]
) -> None:
    settings |= {"num_envs": 8 // world, "total_timesteps": 8 * ITERATION, "learning_rate": 0.003}
    assert codes(run_ranks("train", world, **settings)) == [0] * world
    whole = kept(tmp_path)
    (tmp_path / "runs").rename(tmp_path / "whole")
    for at in (2, 3):  # twice: in the second iteration, and in the third one from there
        stopped = run_ranks("fail", world, how=how, moment="rollout", rank=1, at=at, **settings)
        assert codes(stopped) == expected, stopped
        assert 0 < len(steps(tmp_path)) < 8
    with safe_open(tmp_path / STATE, "pt") as file:
        names = set(file.keys())
    assert {name for name in names if name.startswith("rank")} == {
        f"rank{rank}.{name}"
        for rank in range(1, world)
        for name in names
        if name.split(".")[0] in ("env", "mixed", "pool", "metrics")
    }
    assert codes(run_ranks("train", world, **settings)) == [0] * world
    for name, data in kept(tmp_path).items():
        assert data == whole[name], name


@pytest.mark.parametrize(("before", "after"), [slow(2, 1), (1, 2)])
def test_another_number_of_ranks_begins_new_episodes(
    run_ranks: RunRanks, tmp_path: Path, before: int, after: int
) -> None:
    settings = {"pool": True, "num_envs": 4}
    assert codes(run_ranks("train", before, total_timesteps=4 * ITERATION, **settings)) == [0] * before
    done, batch = steps(tmp_path), ITERATION // 2
    ended = run_ranks("train", after, total_timesteps=8 * ITERATION, env={"LOG_LEVEL": "INFO"}, **settings)
    assert codes(ended) == [0] * after
    line = f"{after} ranks go on where {before} stopped: all envs begin new episodes"
    assert line.replace("1 ranks go", "1 rank goes") in ended[0].err
    assert all(line not in one.err for one in ended[1:])
    all_steps = steps(tmp_path)
    assert all_steps[: len(done)] == done  # nothing is lost
    assert all_steps[-1] >= 8 * ITERATION
    assert all_steps[len(done)] - done[-1] in {after * batch * share / 4 for share in (4, 5, 6)}
    result = json.loads((tmp_path / "runs/several/result.json").read_text())
    assert result["agent_step"] == all_steps[-1]


def test_a_stop_before_the_first_iteration_s_end_is_answered_on_all(run_ranks: RunRanks, tmp_path: Path) -> None:
    """One rank only is sent the signal; the state holds both."""
    ended = run_ranks("fail", 2, how="asked to stop", moment="rollout", rank=0, at=1, checkpoint_interval=100)
    assert codes(ended) == [-15, -15]
    assert len(steps(tmp_path)) == 1
    with safe_open(tmp_path / STATE, "pt") as file:
        assert any(name.startswith("rank1.env.") for name in file.keys())  # noqa: SIM118  (no dict)
