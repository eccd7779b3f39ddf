"""How many agents learn: shares as seats in decimal arithmetic, and the three schedules, by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.pool_config import ShareSchedule
from dual_policy_plugin.share_schedule import count_learners, next_num_learner, possible_counts, shortest_share


def following(schedule: ShareSchedule, **now: Any) -> int:
    usual = {
        "start_pct": 0.5, "agent_step": 0, "total_timesteps": 1000, "num_agents": 8, "current": 4, "wins": 0.0,
        "episodes": 0,
    }  # fmt: skip
    return next_num_learner(schedule, **(usual | now))


# Shares as seats


@pytest.mark.parametrize(
    ("num_agents", "pct", "expected"),
    [
        (50, 0.29, 15),
        (8, 0.5, 4),
        (24, 0.5, 12),
        (3, 0.5, 2),
        (5, 0.5, 3),
        (10, 0.25, 3),
        (10, 0.24999, 2),
        (7, 1.0, 7),
        (1, 1, 1),
        (60000, 1e-05, 1),
    ],
)
def test_rounds_half_up_in_decimal(num_agents: int, pct: float, expected: int) -> None:
    assert count_learners(num_agents, pct) == expected


def test_the_shortest_share_that_gives_a_number_of_seats() -> None:
    found = [shortest_share(count, 8) for count in range(1, 9)]
    assert found == ["0.1", "0.2", "0.4", "0.5", "0.6", "0.8", "0.9", "1.0"]
    assert shortest_share(1, 50) == "0.02"


@pytest.mark.parametrize(
    ("num_agents", "share", "line"),
    [
        (4, 0.1, "some.key=0.1 leaves no learner among 4 agents; use at least 0.2"),
        (4, 0.9, "some.key=0.9 leaves no NPC among 4 agents; use at most 0.8, or 1.0 for none"),
        (1, 0.5, "some.key=0.5 leaves no NPC: the env has one agent; use an env with more, or 1.0"),
    ],
)
def test_impossible_shares_say_what_works(num_agents: int, share: float, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        count_learners(num_agents, share, "some.key")
    assert str(caught.value) == line


# steps


def test_steps_change_the_share_at_their_learner_steps() -> None:
    schedule = ShareSchedule(type="steps", at=[100, 250], values=[0.25, 1.0])
    at = {0: 4, 99: 4, 100: 2, 249: 2, 250: 8, 10**9: 8}
    assert {step: following(schedule, agent_step=step) for step in at} == at
    # neither what was played nor the number now matters: a run that goes on comes to the same
    assert following(schedule, agent_step=100, current=8, wins=900.0, episodes=1000) == 2
    assert possible_counts(schedule, 0.5, 8) == [2, 4, 8]


# linear


def test_linear_goes_straight_to_its_end() -> None:
    schedule = ShareSchedule(type="linear", end=0.25, until=400)
    # 6 seats at 0, 2 at 400: one fewer every 100 steps, half-way between rounded up
    at = {0: 6, 50: 6, 51: 5, 150: 5, 151: 4, 250: 4, 251: 3, 350: 3, 351: 2, 400: 2, 401: 2, 10**9: 2}
    assert {step: following(schedule, start_pct=0.75, agent_step=step) for step in at} == at
    assert possible_counts(schedule, 0.75, 8) == [2, 3, 4, 5, 6]
    assert possible_counts(ShareSchedule(type="linear", end=0.75), 0.25, 8) == [2, 3, 4, 5, 6]


def test_linear_lasts_the_whole_run_where_nothing_else_is_said() -> None:
    schedule = ShareSchedule(type="linear", end=0.75)
    assert following(schedule, start_pct=0.25, agent_step=500) == 4
    assert following(schedule, start_pct=0.25, agent_step=500, total_timesteps=500) == 6


def test_all_seats_learn_only_where_the_share_is_1() -> None:
    down = ShareSchedule(type="linear", end=0.5, until=1000)
    assert [following(down, start_pct=1.0, agent_step=step) for step in (0, 1, 10, 500, 1000)] == [8, 7, 7, 6, 4]
    up = ShareSchedule(type="linear", end=1.0, until=1000)
    assert [following(up, start_pct=0.5, agent_step=step) for step in (0, 999, 1000, 1001)] == [4, 7, 8, 8]
    assert possible_counts(up, 0.5, 8) == [4, 5, 6, 7, 8]


def test_one_agent_always_learns() -> None:
    schedule = ShareSchedule(type="linear", end=0.125, until=1000)
    assert following(schedule, start_pct=0.125, num_agents=4, agent_step=5) == 1  # half a seat


def test_linear_is_exact_where_floats_are_not() -> None:
    schedule = ShareSchedule(type="linear", end=0.7, until=4)
    assert 0.2 + (0.7 - 0.2) * (2 / 4) < 0.45  # 0.45 of 10 seats is 4.5, rounded up
    assert following(schedule, start_pct=0.2, agent_step=2, num_agents=10) == 5


# adaptive


@pytest.mark.parametrize(
    ("current", "wins", "episodes", "expected"),
    [
        (4, 61, 100, 3),  # too strong: one learner fewer
        (4, 60, 100, 4),
        (4, 50, 100, 4),
        (4, 40, 100, 4),
        (4, 39.5, 100, 5),  # too weak: one more
        (4, 99, 99, 4),  # too few episodes to tell
        (4, 0, 99, 4),
        (4, 0, 0, 4),
        (2, 100, 100, 2),  # low
        (3, 100, 100, 2),
        (6, 0, 100, 6),  # high
        (5, 0, 100, 6),
    ],
)
def test_adaptive_moves_by_one_seat_within_its_bounds(current: int, wins: float, episodes: int, expected: int) -> None:
    schedule = ShareSchedule(type="adaptive", low=0.25, high=0.75, min_episodes=100)
    assert following(schedule, current=current, wins=wins, episodes=episodes) == expected
    assert possible_counts(schedule, 0.5, 8) == [2, 3, 4, 5, 6]


def test_adaptive_leaves_a_learner_and_an_npc() -> None:
    schedule = ShareSchedule(type="adaptive", band=[0.45, 0.55], min_episodes=1)
    assert following(schedule, num_agents=3, current=1, wins=9, episodes=9) == 1
    assert following(schedule, num_agents=3, current=2, wins=0, episodes=9) == 2
    assert following(schedule, num_agents=3, current=2, wins=5.1, episodes=9) == 1
    assert possible_counts(schedule, 0.5, 3) == [1, 2]
    assert possible_counts(schedule, 0.5, 2) == [1]


# What a run may come to


@pytest.mark.parametrize(
    ("schedule", "line"),
    [
        (
            ShareSchedule(type="steps", at=[1, 2], values=[0.5, 0.01]),
            "trainer.dual_policy.pct_schedule.values[1]=0.01 leaves no learner among 8 agents; use at least 0.1",
        ),
        (
            ShareSchedule(type="steps", at=[1], values=[0.9999]),
            "trainer.dual_policy.pct_schedule.values[0]=0.9999 leaves no NPC among 8 agents; use at most 0.9, "
            "or 1.0 for none",
        ),
        (
            ShareSchedule(type="linear", end=0.01),
            "trainer.dual_policy.pct_schedule.end=0.01 leaves no learner among 8 agents; use at least 0.1",
        ),
    ],
)  # fmt: skip
def test_a_share_that_cannot_be_is_found_before_the_run(schedule: ShareSchedule, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        possible_counts(schedule, 0.5, 8)
    assert str(caught.value) == line
    with pytest.raises(ConfigError, match=r"training_agents_pct=0.01 leaves no learner"):
        possible_counts(schedule, 0.01, 8)


shares = st.integers(1, 100).map(lambda percent: percent / 100)
schedules = st.one_of(
    st.builds(
        lambda values: ShareSchedule(type="steps", at=[100 * (k + 1) for k in range(len(values))], values=values),
        st.lists(shares, min_size=1, max_size=4),
    ),
    st.builds(lambda end: ShareSchedule(type="linear", end=end), shares),
    st.builds(lambda low: ShareSchedule(type="adaptive", low=low / 2, min_episodes=10), shares),
)


@settings(max_examples=200, deadline=None)
@given(schedule=schedules, start_pct=shares, num_agents=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_a_run_comes_only_to_the_counts_that_were_foreseen(
    schedule: ShareSchedule, start_pct: float, num_agents: int, seed: int
) -> None:
    if schedule.type == "adaptive":
        start_pct = max(start_pct / 2, schedule.low)
    try:
        foreseen = possible_counts(schedule, start_pct, num_agents)
    except ConfigError:
        return
    assert foreseen == sorted(set(foreseen))
    current = count_learners(num_agents, start_pct)
    seen = {current}
    for step in range(0, 1100, 10):
        seed = seed * 1103515245 + 12345 & 0x7FFFFFFF
        following_count = following(
            schedule, start_pct=start_pct, agent_step=step, num_agents=num_agents, current=current,
            wins=seed % 21, episodes=20,
        )  # fmt: skip
        assert schedule.type != "adaptive" or abs(following_count - current) <= 1
        current = following_count
        seen.add(current)
    assert seen <= set(foreseen)
    if schedule.type == "steps":
        assert seen == set(foreseen)
