"""The one owner of the split: every seat has one policy, rounding is decimal, impossible shares say what works."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.rollout.assignment import assign


@settings(max_examples=300, deadline=None)
@given(
    num_agents=st.integers(1, 64),
    pct=st.floats(0.001, 1.0),
    layout=st.sampled_from(["first", "last", "interleaved"]),
)
def test_partitions_all_seats(num_agents: int, pct: float, layout: str) -> None:
    try:
        split = assign(num_agents, pct, layout)
    except ConfigError as error:
        # the share that the message names works
        share = re.findall(r"use at (?:least|most) ([\d.]+\d)", str(error))
        if share:
            assert assign(num_agents, float(share[0]), layout).num_learner in (1, num_agents - 1)
        else:
            assert num_agents == 1
        return
    assert sorted([*split.learner_seats, *split.npc_seats]) == list(range(num_agents))
    assert len(split.learner_seats) == split.num_learner
    assert len(split.npc_seats) == split.num_npc
    assert abs(split.num_learner - pct * num_agents) <= 0.5 + 1e-9


def test_layouts() -> None:
    assert assign(8, 0.25).learner_seats == (0, 1)
    assert assign(8, 0.25, "last").learner_seats == (6, 7)
    assert assign(8, 0.25, "interleaved").learner_seats == (0, 4)
    assert assign(5, 0.6, "interleaved").learner_seats == (0, 1, 3)
    assert assign(4, 0.5, [3, 1]).learner_seats == (1, 3)
    assert assign(4, 0.5, [3, 1]).npc_seats == (0, 2)


@pytest.mark.parametrize(
    ("num_agents", "pct", "layout", "words"),
    [
        (8, 0.01, "first", ["training_agents_pct=0.01", "8 agents", "0.1"]),
        (8, 0.99, "first", ["training_agents_pct=0.99", "at most 0.9", "1.0"]),
        (1, 0.7, "first", ["one agent"]),
        (8, 0.5, "middle", ["assignment=middle", "interleaved"]),
        (4, 0.5, [0, 0], ["[0, 0]", "0 to 3"]),
        (4, 0.5, [0, 4], ["[0, 4]", "0 to 3"]),
        (4, 0.5, [0, 1, 2], ["3 learner seats", "0.8"]),
    ],
)
def test_impossible_splits_say_what_works(
    num_agents: int, pct: float, layout: str | list[int], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        assign(num_agents, pct, layout)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
