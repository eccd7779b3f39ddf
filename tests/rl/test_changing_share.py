"""Runs in which the share of learners changes: only between iterations, with new episodes, and resumable."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dual_policy_plugin.checkpoint import decode_policy
from dual_policy_plugin.config import Config
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.pool_config import ShareSchedule
from dual_policy_plugin.rng import LOW_31_BITS, hash32
from dual_policy_plugin.run_state import Counters
from dual_policy_plugin.seating import later_seed
from dual_policy_plugin.train import train
from tests.rl.test_dual_policy_training import small_config


def scheduled(path: Path, schedule: dict[str, Any], run: str = "small", **trainer: Any) -> Config:
    """16 envs of 8 agents, 16 steps an iteration: 1,024 learner steps with 4 learners, 256 more with each."""
    config = small_config(path, run, **({"anneal_lr": False, "checkpoint_interval": 1} | trainer))
    dual = replace(config.trainer.dual_policy, pct_schedule=ShareSchedule(**schedule))
    return replace(config, trainer=replace(config.trainer, dual_policy=dual), evals=replace(config.evals, episodes=0))


def lines_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return decode_policy((path / "checkpoints/latest.safetensors").read_bytes(), "latest").tensors


def test_a_step_in_the_schedule_changes_the_share_between_two_iterations(tmp_path: Path) -> None:
    schedule = {"type": "steps", "at": [2048, 3584], "values": [0.25, 0.75]}
    train(scheduled(tmp_path, schedule, total_timesteps=6656))
    lines = lines_of(tmp_path / "small")
    learners = [int(line["dual_policy/policy_a_agent_count"]) for line in lines]
    assert learners == [4, 4, 2, 2, 2, 6, 6]
    assert [int(line["dual_policy/npc_agent_count"]) for line in lines] == [8 - count for count in learners]
    steps = [0.0, *(line["charts/agent_step"] for line in lines)]
    assert [after - before for before, after in pairwise(steps)] == [256 * n for n in learners]
    assert lines[-1]["charts/env_agent_step"] == 7 * 16 * 16 * 8
    # an episode has 32 steps: none that began with the change can have ended within two iterations
    has_episodes = ["dual_policy/episodes" in line for line in lines]
    assert has_episodes[2:4] == [False, False]
    assert has_episodes[4]
    assert has_episodes[5:7] == [False, False]


def test_a_linear_share_passes_through_every_number_of_learners(tmp_path: Path) -> None:
    schedule = {"type": "linear", "end": 0.125}
    train(scheduled(tmp_path, schedule, total_timesteps=8192))
    learners = [int(line["dual_policy/policy_a_agent_count"]) for line in lines_of(tmp_path / "small")]
    assert learners[0] == 4
    assert learners == sorted(learners, reverse=True)
    assert set(learners) == {1, 2, 3, 4}


def test_an_adaptive_share_follows_the_win_rate(tmp_path: Path) -> None:
    # whatever the learner does, its win rate is above a band that ends near 0: one learner fewer at each change
    schedule = {"type": "adaptive", "band": [0.0, 0.001], "min_episodes": 8, "low": 0.25}
    train(scheduled(tmp_path, schedule, total_timesteps=10 * 1024))
    learners = [int(line["dual_policy/policy_a_agent_count"]) for line in lines_of(tmp_path / "small")]
    assert learners[0] == 4
    assert learners[-1] == 2
    assert 3 in learners


def test_a_run_stopped_after_the_change_goes_on_bit_for_bit(tmp_path: Path) -> None:
    schedule = {"type": "steps", "at": [2048], "values": [0.25]}
    whole, parts = scheduled(tmp_path, schedule, "whole"), scheduled(tmp_path, schedule, "parts")
    train(replace(whole, trainer=replace(whole.trainer, total_timesteps=4096)), resolved_yaml="seed: 1\n")
    for steps in (1024, 2048, 2560, 4096):  # stopped before, at and after the change
        train(replace(parts, trainer=replace(parts.trainer, total_timesteps=steps)), resolved_yaml="seed: 1\n")
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "parts")
    first, second = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_too_few_rows_for_a_later_share_are_found_before_the_first_step(tmp_path: Path) -> None:
    schedule = {"type": "steps", "at": [2048], "values": [0.125]}
    config = scheduled(tmp_path, schedule, num_minibatches=32)
    with pytest.raises(ConfigError, match=r"trainer.num_minibatches=32 is more than the 16 learner rows"):
        train(config)
    assert not (tmp_path / "small/metrics.jsonl").exists()


@pytest.mark.parametrize("uris", [["builtin://arena/random"], ["builtin://arena/weak", "builtin://arena/random"]])
def test_a_held_out_policy_that_plays_in_the_run_is_refused(tmp_path: Path, uris: list[str]) -> None:
    config = small_config(tmp_path)
    config = replace(config, evals=replace(config.evals, held_out=uris))
    with pytest.raises(ConfigError, match=r"evals.held_out=builtin://arena/random is the NPC random of this run"):
        train(config)


def test_a_held_out_policy_is_found_by_its_bytes_under_another_name(tmp_path: Path) -> None:
    train(small_config(tmp_path, "first"))
    made = (tmp_path / "first/checkpoints/latest.safetensors").read_bytes()
    (tmp_path / "copy.safetensors").write_bytes(made)
    second = small_config(tmp_path, "second")
    dual = replace(
        second.trainer.dual_policy,
        npc=replace(second.trainer.dual_policy.npc, uri=str(tmp_path / "first")),  # type: ignore[type-var]
    )
    second = replace(
        second,
        trainer=replace(second.trainer, dual_policy=dual),
        evals=replace(second.evals, held_out=[str(tmp_path / "copy.safetensors")]),
    )
    with pytest.raises(ConfigError, match=r"evals.held_out=.*copy.safetensors is the NPC first.model_0004"):
        train(second)


def test_held_out_policies_are_evaluated_and_have_no_say_in_the_objective(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config = replace(config, evals=replace(config.evals, held_out=["builtin://arena/hunter"]))
    result = train(config)
    assert [match["opponent"] for match in result["evals"]] == ["random", "hunter"]
    assert result["objective"] == result["evals"][0]["win_rate"]


def test_episodes_after_a_change_are_those_of_no_evaluation() -> None:
    """`dual-policy evaluate` plays the seed's rounds as hash32(seed, round)."""
    later = {later_seed(Config(seed=1), Counters(iteration=i)) for i in range(2000)}
    assert len(later) == 2000
    assert not later & {int(hash32(1, i)) & LOW_31_BITS for i in range(2000)}
