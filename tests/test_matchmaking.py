"""Which NPC plays next: tables worked by hand, properties of all types, and the shares that the pool really draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dual_policy_plugin.matchmaking import Record, probabilities
from dual_policy_plugin.policies.nets import MlpPolicy
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.pool_config import MATCHMAKING, MatchmakingConfig
from dual_policy_plugin.rng import NPC_DRAW, uniform
from dual_policy_plugin.types import ObservationSpace

STEP = 2.0**-24  # shares are multiples of it

NONE, ALL_WIN, ALL_LOSE = Record(), Record(100, 100), Record(0, 100)


def rates(*win_rates: float, games: float = 100) -> list[Record]:
    return [Record(wins=w * games, games=games) for w in win_rates]


def shares(records: Sequence[Record], *, weights: Sequence[float] = (), **settings: Any) -> list[float]:
    """Without exploration, unless a test asks for some."""
    config = MatchmakingConfig(**{"explore": 0.0, **settings})
    return probabilities(records, weights or [1.0] * len(records), config)


def expected_win_rate(given_shares: Sequence[float], records: Sequence[Record]) -> float:
    return math.fsum(p * r.wins / r.games for p, r in zip(given_shares, records, strict=True))


# Records


def test_a_record_adds_up_and_forgets_beyond_its_memory() -> None:
    record = Record()
    record.add(3, 4, memory=10)
    record.add(0.5, 6, memory=10)  # a draw among them
    assert (record.wins, record.games) == (3.5, 10)
    record.add(10, 10, memory=10)  # 13.5 of 20, at half their weight
    assert (record.wins, record.games) == (6.75, 10)
    record.add(5000, 5000, memory=10)  # more at once than it remembers
    assert record.games == 10
    assert record.wins == pytest.approx(10 * 5006.75 / 5010)
    before = Record(record.wins, record.games)
    record.add(0, 0, memory=10)
    assert record == before


def test_a_record_follows_a_learner_that_changed() -> None:
    record = Record()
    for _ in range(100):
        record.add(0, 50, memory=100)
    for _ in range(3):
        record.add(50, 50, memory=100)
    # each 50 games leave 100/150 of what was there
    assert record.wins / record.games == pytest.approx(1 - (2 / 3) ** 3)


@settings(max_examples=100, deadline=None)
@given(memory=st.integers(1, 50), batches=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 999)), max_size=20))
def test_a_record_never_holds_more_wins_than_games_nor_more_games_than_its_memory(
    memory: int, batches: list[tuple[float, int]]
) -> None:
    record = Record()
    for fraction, games in batches:
        record.add(fraction * games, games, memory)
        assert 0 <= record.wins <= record.games <= memory


def test_impossible_games_are_our_own_mistake() -> None:
    for wins, games in ((2, 1), (-1, 1), (math.nan, 1)):
        with pytest.raises(AssertionError):
            Record().add(wins, games, memory=10)


# Tables worked by hand


@pytest.mark.parametrize(
    ("records", "config", "expected"),
    [
        ([NONE], {}, [1]),
        (rates(0, 1, 0.5, 0.3), {}, [0.25] * 4),
        # latest_biased: the newest is the last
        ([NONE], {"type": "latest_biased", "latest_share": 0.25}, [1]),
        ([NONE] * 2, {"type": "latest_biased", "latest_share": 0.25}, [0.75, 0.25]),
        ([NONE] * 5, {"type": "latest_biased"}, [0.125] * 4 + [0.5]),
        ([NONE] * 3, {"type": "latest_biased", "latest_share": 0}, [0.5, 0.5, 0]),
        ([NONE] * 3, {"type": "latest_biased", "latest_share": 1}, [0, 0, 1]),
        # pfsp, squared: (1 - w)^2
        ([ALL_WIN], {"type": "pfsp"}, [1]),
        ([ALL_WIN] * 3, {"type": "pfsp"}, [1 / 3] * 3),
        ([ALL_LOSE] * 3, {"type": "pfsp"}, [1 / 3] * 3),
        ([NONE] * 3, {"type": "pfsp"}, [1 / 3] * 3),
        ([ALL_WIN, ALL_LOSE], {"type": "pfsp"}, [0, 1]),
        (rates(0.5, 0), {"type": "pfsp"}, [0.2, 0.8]),
        ([ALL_WIN, NONE, ALL_LOSE], {"type": "pfsp"}, [0, 0.2, 0.8]),
        (rates(0.2, 0.6, 0.8), {"type": "pfsp"}, [64 / 84, 16 / 84, 4 / 84]),
        ([ALL_WIN, ALL_LOSE], {"type": "pfsp", "explore": 0.1}, [0.05, 0.95]),
        ([ALL_WIN, ALL_LOSE], {"type": "pfsp", "explore": 1}, [0.5, 0.5]),
        # 19 lost games of 20 needed count as none: 1/2; the 20th makes it 0
        ([Record(0, 19), Record(10, 20)], {"type": "pfsp"}, [0.5, 0.5]),
        ([Record(0, 20), Record(10, 20)], {"type": "pfsp"}, [0.8, 0.2]),
        ([Record(0, 1), Record(0.5, 1)], {"type": "pfsp", "min_games": 1}, [0.8, 0.2]),
        # pfsp, variance: w (1 - w)
        ([ALL_WIN, ALL_LOSE, ALL_WIN], {"type": "pfsp", "form": "variance"}, [1 / 3] * 3),
        ([ALL_WIN, NONE, ALL_LOSE], {"type": "pfsp", "form": "variance"}, [0, 1, 0]),
        (rates(0.5, 0.1), {"type": "pfsp", "form": "variance"}, [25 / 34, 9 / 34]),
        # adaptive: even shares where they do, else the nearer edge of [0.4, 0.6]
        ([ALL_WIN], {"type": "adaptive"}, [1]),
        (rates(0.2, 0.8), {"type": "adaptive"}, [0.5, 0.5]),
        (rates(0.1, 0.7, 0.6), {"type": "adaptive"}, [1 / 3] * 3),
        ([NONE] * 3, {"type": "adaptive", "band": [0.1, 0.2]}, [1 / 3] * 3),
        (rates(0.4, 0.9), {"type": "adaptive"}, [0.6, 0.4]),  # 0.24 + 0.36 = 0.6
        (rates(0.9, 0.4), {"type": "adaptive"}, [0.4, 0.6]),
        (rates(0.1, 0.6), {"type": "adaptive"}, [0.4, 0.6]),  # 0.04 + 0.36 = 0.4
        ([NONE, *rates(1)], {"type": "adaptive"}, [0.8, 0.2]),  # 0.5 until it is known: 0.4 + 0.2 = 0.6
        ([NONE, *rates(1)], {"type": "adaptive", "band": [0.2, 0.6]}, [2 / 3, 1 / 3]),  # the middle: 0.4
        ([ALL_WIN] * 3, {"type": "adaptive"}, [1 / 3] * 3),
        (rates(0.7, 0.9, 0.7), {"type": "adaptive"}, [0.5, 0, 0.5]),  # out of reach: the strongest
        (rates(0.3, 0.1), {"type": "adaptive"}, [1, 0]),  # out of reach: the weakest
        ([ALL_LOSE] * 2, {"type": "adaptive"}, [0.5, 0.5]),
        (rates(0.6, 0.9), {"type": "adaptive"}, [1, 0]),  # the edge itself
        (rates(0.7, 0.9), {"type": "adaptive", "explore": 0.2}, [0.9, 0.1]),
    ],
)
def test_tables_worked_by_hand(records: list[Record], config: dict[str, Any], expected: list[float]) -> None:
    assert shares(records, **config) == pytest.approx(expected, abs=STEP)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([3], [1]),
        ([1, 1, 1, 1], [0.25] * 4),
        ([1, 0, 3], [0.25, 0, 0.75]),
        ([0, 0, 5], [0, 0, 1]),
        ([5, 0, 0], [1, 0, 0]),
        ([1e308, 1e308, 0], [0.5, 0.5, 0]),
        ([5e-324, 5e-324], [0.5, 0.5]),
    ],
)
def test_weights_are_shares(weights: list[float], expected: list[float]) -> None:
    assert shares([ALL_WIN] * len(weights), weights=weights, type="weights") == expected


def test_weights_are_read_by_their_type_alone_and_one_is_above_0() -> None:
    assert shares([NONE] * 2, weights=[1, 3], type="uniform") == [0.5, 0.5]
    with pytest.raises(AssertionError, match="no NPC has a share"):
        shares([NONE] * 2, weights=[0, 0], type="weights")
    with pytest.raises(AssertionError, match="no NPC to choose"):
        probabilities([], [], MatchmakingConfig())


def test_adaptive_tilts_three_npcs_as_the_formula_says() -> None:
    # p ~ (1, x, x^2) for equal gaps; mean 0.4 + 0.3 (x + 2 x^2) / (1 + x + x^2) = 0.6 gives 4 x^2 + x - 2 = 0
    x = (-1 + math.sqrt(33)) / 8
    expected = [term / (1 + x + x * x) for term in (1, x, x * x)]
    assert shares(rates(0.4, 0.7, 1), type="adaptive") == pytest.approx(expected, abs=STEP)
    mirrored = shares(rates(0.6, 0.3, 0), type="adaptive")
    assert mirrored == pytest.approx(expected, abs=STEP)


# Properties


records_lists = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 60)).map(lambda one: Record(one[0] * one[1], one[1])),
    min_size=1,
    max_size=12,
)
configs = st.builds(
    lambda band, **rest: MatchmakingConfig(band=sorted(band), **rest),
    type=st.sampled_from(MATCHMAKING),
    form=st.sampled_from(["squared", "variance"]),
    latest_share=st.floats(0, 1),
    band=st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True),
    explore=st.floats(0, 1),
)


@settings(max_examples=200, deadline=None)
@given(records=records_lists, config=configs, data=st.data())
def test_shares_are_what_float32_can_add_up_to_exactly_1(
    records: list[Record], config: MatchmakingConfig, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0, 1e308), min_size=len(records), max_size=len(records)))
    assume(any(weights))
    found = probabilities(records, weights, config)
    assert len(found) == len(records)
    assert all(0 <= share <= 1 and (share / STEP).is_integer() for share in found)
    cumulated = torch.tensor(found, dtype=torch.float32).cumsum(0)
    assert cumulated.tolist() == list(accumulate(found))  # no rounding anywhere
    assert cumulated[-1] == 1


@settings(max_examples=200, deadline=None)
@given(records=records_lists, config=configs, data=st.data())
def test_the_order_of_the_npcs_matters_to_latest_biased_alone(
    records: list[Record], config: MatchmakingConfig, data: st.DataObject
) -> None:
    assume(config.type != "latest_biased")
    weights = [1.0 + k for k in range(len(records))]
    order = data.draw(st.permutations(range(len(records))))
    found = probabilities(records, weights, config)
    permuted = probabilities([records[k] for k in order], [weights[k] for k in order], config)
    assert permuted == pytest.approx([found[k] for k in order], abs=2 * STEP)


@settings(max_examples=200, deadline=None)
@given(win_rates=st.lists(st.floats(0, 1), min_size=2, max_size=12), explore=st.floats(0, 1))
def test_squared_pfsp_never_gives_a_harder_npc_less(win_rates: list[float], explore: float) -> None:
    found = shares(rates(*win_rates), type="pfsp", explore=explore)
    ordered = [share for _, share in sorted(zip(win_rates, found, strict=True), key=lambda one: one[0])]
    assert all(harder >= easier - STEP for harder, easier in pairwise(ordered))


@settings(max_examples=200, deadline=None)
@given(
    win_rates=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    band=st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True).map(sorted),
)
def test_adaptive_holds_the_win_rate_in_the_band_or_goes_as_near_as_it_can(
    win_rates: list[float], band: list[float]
) -> None:
    records = rates(*win_rates)
    win_rates = [record.wins / record.games for record in records]
    mean = expected_win_rate(shares(records, type="adaptive", band=band), records)
    low, high = band
    nearest = min(max(math.fsum(win_rates) / len(win_rates), low), high)
    nearest = min(max(nearest, min(win_rates)), max(win_rates))
    assert mean == pytest.approx(nearest, abs=2 * len(win_rates) * STEP)


@settings(max_examples=100, deadline=None)
@given(win_rates=st.lists(st.floats(0.01, 0.99), min_size=3, max_size=6), data=st.data())
def test_adaptive_is_nearer_to_even_shares_than_others_in_the_band(win_rates: list[float], data: st.DataObject) -> None:
    records = rates(*win_rates)
    found = shares(records, type="adaptive")
    weights = data.draw(st.lists(st.floats(0, 1), min_size=len(records), max_size=len(records)).filter(any))
    other = [weight / sum(weights) for weight in weights]
    assume(0.4 <= expected_win_rate(other, records) <= 0.6)

    def entropy(given_shares: Sequence[float]) -> float:
        return -math.fsum(p * math.log(p) for p in given_shares if p > 0)

    assert entropy(found) >= entropy(other) - 1e-5


def test_many_npcs_are_no_trouble() -> None:
    records = rates(*(0.7 + 0.3 * k / 1023 for k in range(1024)))
    for config in ({"type": "pfsp"}, {"type": "adaptive", "band": [0.2, 0.71]}, {"type": "uniform"}):
        found = shares(records, **config)
        assert sum(found) == 1
        assert min(found) >= 0
    assert shares(records, type="uniform") == [1 / 1024] * 1024


# What is really drawn


@pytest.fixture
def pool() -> Callable[[list[float], int], NpcPool]:
    """A pool with given probabilities over so many envs."""
    space = ObservationSpace(
        kind="window", shape=(12,), features=("empty", "wall", "foe"), window=(3, 3), own=("ore", "time"),
        scales=(2, 255),
    )  # fmt: skip

    def make(given_shares: list[float], num_envs: int) -> NpcPool:
        npcs = [
            Npc(name=str(k), policy=MlpPolicy(space, ("noop", "left"), hidden_size=4).requires_grad_(False))
            for k in range(len(given_shares))
        ]
        result = NpcPool(npcs, num_envs=num_envs, num_npc=1, device=torch.device("cpu"))
        result.probabilities.copy_(torch.tensor(given_shares))
        return result

    return make


def test_the_pool_draws_the_shares(pool: Callable[[list[float], int], NpcPool]) -> None:
    records = [ALL_WIN, *rates(0.2, 0.5, 0.8), NONE]
    found = shares(records, type="pfsp", explore=0.0)
    assert found == pytest.approx([0, 64 / 118, 25 / 118, 4 / 118, 25 / 118], abs=STEP)
    num_envs, num_draws = 4096, 40
    drawing = pool(found, num_envs)
    dones, counts = torch.ones(num_envs, dtype=torch.bool), torch.zeros(5)
    for step in range(num_draws):
        drawing.end_steps(dones, dones, uniform(7, NPC_DRAW, step, torch.arange(num_envs)))
        counts += torch.bincount(drawing.npc_of_env, minlength=5)
    assert counts[0] == 0  # one that the learner always beats has no share
    total = num_envs * num_draws
    chi_square = sum((float(counts[k]) - total * found[k]) ** 2 / (total * found[k]) for k in range(1, 5))
    assert chi_square < 21.1, counts  # 3 degrees of freedom: one in 10,000 seeds is above


@pytest.mark.parametrize("where", [0, 2, 4])
def test_an_npc_without_a_share_is_never_drawn(where: int, pool: Callable[[list[float], int], NpcPool]) -> None:
    weights = [0.1, 0.7, 0.3, 0.9, 0.2]  # their shares are no binary fractions
    weights[where] = 0
    found = shares([NONE] * 5, weights=weights, type="weights")
    edges = [edge for share in accumulate(found) for edge in (share - STEP, share)]
    draws = torch.tensor([0.0, *(edge for edge in edges if 0 <= edge < 1), 1 - STEP])
    drawing = pool(found, len(draws))
    ends = torch.ones(len(draws), dtype=torch.bool)
    drawing.end_steps(ends, ends, draws)
    assert set(drawing.npc_of_env.tolist()) == {0, 1, 2, 3, 4} - {where}
