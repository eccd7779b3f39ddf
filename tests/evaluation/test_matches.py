"""A match: both seatings, as many episodes as asked, the stronger policy wins, equals draw even."""

from __future__ import annotations

import pytest
import torch

from dual_policy_plugin.envs.arena import make_arena
from dual_policy_plugin.evaluation.matches import MatchResult, play_match
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.policies.pool import Npc
from dual_policy_plugin.rollout.assignment import assign
from tests.harness import CPU

ARGS = {"episode_steps": 64, "num_agents": 4, "height": 8, "width": 8, "mines": 2, "altars": 2, "walls": 0}


def match(one: str, other: str, *, episodes: int = 200, pct: float = 0.5, seed: int = 3) -> MatchResult:
    env = make_arena(50, ARGS, CPU)
    policies = [build_policy(name, {}, env.spec.observation_space, env.spec.actions) for name in (one, other)]
    return play_match(
        policies[0],
        Npc(name=other, policy=policies[1]),
        env,
        assign(4, pct),
        episodes=episodes,
        seed=seed,
        device=CPU,
    )


def test_the_stronger_wins_from_both_seatings() -> None:
    strong, weak = match("forager", "random"), match("random", "forager")
    assert strong.episodes == weak.episodes == 200
    assert strong.win_rate > 0.9
    assert weak.win_rate < 0.1
    assert strong.low < strong.win_rate <= strong.high
    assert strong.learner_return > strong.opponent_return
    assert weak.learner_return < weak.opponent_return


def test_a_policy_against_itself_is_even() -> None:
    result = match("forager", "forager", episodes=600)
    assert result.low < 0.5 < result.high
    assert result.learner_return == pytest.approx(result.opponent_return, rel=0.1)


def test_the_same_seed_gives_the_same_match_and_rounds_fill_up() -> None:
    assert match("forager", "random", seed=5) == match("forager", "random", seed=5)
    assert match("forager", "random", seed=5) != match("forager", "random", seed=6)
    assert match("random", "random", episodes=101).episodes == 200  # two rounds of 50 envs, both seatings


def test_an_unequal_split_compares_means() -> None:
    result = match("random", "random", pct=0.25, episodes=400)
    assert 0.3 < result.win_rate < 0.7


def test_episodes_of_different_lengths_have_one_vote_each() -> None:
    """Only the first episode of each env counts, so short ones are not counted more often."""
    env = make_arena(8, ARGS, CPU)
    policy = build_policy("random", {}, env.spec.observation_space, env.spec.actions)
    result = play_match(
        policy, Npc(name="r", policy=policy), env, assign(4, 0.5), episodes=16, seed=1, device=torch.device("cpu")
    )
    assert result.episodes == 16
