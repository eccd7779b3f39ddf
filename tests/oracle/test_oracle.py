"""The learner finds the exact best response to a frozen poker player; and the rules, the enumeration and the NPC's file
are what they claim to be. `make oracle` trains on every seat, with five seeds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest

from dual_policy_plugin.envs.adapt import as_host
from tests.envs.toy_envs import play, step
from tests.harness import logging_as_it_was
from tests.oracle.best_response import Strategy, best_response, mean_value, npc_value, value
from tests.oracle.kuhn import (
    BET,
    LETTERS,
    PASS,
    Kuhn,
    decision_histories,
    information_sets,
    is_over,
    payoffs,
)
from tests.oracle.npcs import TABLES, equilibrium, read_strategy, write_npc
from tests.oracle.run import LIMIT_S, REACHED, train_and_measure

SEATS = [(table, seat) for table in TABLES for seat in range(TABLES[table].num_players)]


def final_histories(num_players: int) -> list[str]:
    longer = [history + letter for history in decision_histories(num_players) for letter in LETTERS]
    return [history for history in longer if is_over(num_players, history)]


def always(letter: str, num_players: int) -> Strategy:
    return dict.fromkeys(decision_histories(num_players), (float(letter == "b"),) * (num_players + 1))


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ((2, 0), {"pp": [1, -1], "pbp": [-1, 1], "pbb": [2, -2], "bp": [1, -1], "bb": [2, -2]}),
        ((0, 1), {"pp": [-1, 1], "pbp": [-1, 1], "pbb": [-2, 2], "bp": [1, -1], "bb": [-2, 2]}),
        (
            (1, 3, 0),
            {
                "ppp": [-1, 2, -1],
                "bpp": [2, -1, -1], "bpb": [3, -1, -2], "bbp": [-2, 3, -1], "bbb": [-2, 4, -2],
                "pbpp": [-1, 2, -1], "pbpb": [-2, 3, -1], "pbbp": [-1, 3, -2], "pbbb": [-2, 4, -2],
                "ppbpp": [-1, -1, 2], "ppbpb": [-1, 3, -2], "ppbbp": [3, -1, -2], "ppbbb": [-2, 4, -2],
            },
        ),
    ],
)  # fmt: skip
def test_every_final_history_pays_what_the_rules_say(cards: tuple[int, ...], expected: dict[str, list[int]]) -> None:
    assert {history: payoffs(cards, history) for history in final_histories(len(cards))} == expected


def test_who_decides_when() -> None:
    assert decision_histories(2) == ("", "p", "b", "pb")
    assert [len(information_sets(num_players)) for num_players in (2, 3)] == [12, 48]


@pytest.mark.parametrize("num_players", [2, 3])
def test_a_table_plays_every_hand_by_the_rules(num_players: int) -> None:
    """Each deal and each history: who is to act sees just its information set, the others a 1 for "wait"; an action
    out of turn does nothing; a hand's rewards sum up to its payoffs."""
    table, sets = Kuhn(num_players), information_sets(num_players)
    for cards, final in product(permutations(range(num_players + 1), num_players), final_histories(num_players)):
        table.deal(cards)
        seen = table._observe()
        returns = dict.fromkeys(table.possible_agents, 0.0)
        for turn, letter in enumerate(final):
            who = f"seat_{turn % num_players}"
            numbers = {agent: int(row.argmax()) for agent, row in seen.items()}
            assert all(row.sum() == 1 for row in seen.values())
            assert sets[numbers.pop(who) - 1] == (cards[turn % num_players], final[:turn])
            assert set(numbers.values()) == {0}
            action = LETTERS.index(letter)
            actions = {agent: action if agent == who else 1 - action for agent in table.agents}
            seen, rewards, *_ = table.step(actions)
            for agent, reward in rewards.items():
                returns[agent] += reward
            seen = {agent: seen[agent] for agent in table.agents}
        assert table.agents == []
        assert list(returns.values()) == payoffs(cards, final)


@pytest.mark.filterwarnings("ignore:The old environment creation API:DeprecationWarning")  # PettingZoo's own import
@pytest.mark.parametrize("num_players", [2, 3])
def test_a_table_is_a_sound_pettingzoo_env(num_players: int) -> None:
    from pettingzoo.test import parallel_api_test

    parallel_api_test(Kuhn(num_players), num_cycles=200)
    table = Kuhn(num_players)
    deals = np.array([(table.reset(seed=seed), table.cards)[1] for seed in range(2400)])
    for seat in range(num_players):  # within 5 standard deviations of equal shares
        counts, share = np.bincount(deals[:, seat]), 1 / (num_players + 1)
        assert np.abs(counts - 2400 * share).max() < 5 * np.sqrt(2400 * share * (1 - share))


def test_in_a_worker_who_waits_keeps_its_seat_and_who_folds_leaves_it() -> None:
    table = Kuhn(3)
    runner, rows = play(table)
    table.deal((1, 3, 0))
    step(runner, rows, BET, PASS, PASS)
    assert rows.weights.tolist() == [1, 1, 1]
    assert rows.rewards.tolist() == [0, 0, 0]
    step(runner, rows, PASS, PASS, BET)  # seat 1 folds the best card and has lost its ante
    assert rows.weights.tolist() == [1, 1, 1]
    assert rows.rewards.tolist() == [0, -1, 0]
    assert rows.dones.tolist() == [False, True, False]
    step(runner, rows, PASS, PASS, BET)  # seat 2 calls with the lowest
    assert rows.weights.tolist() == [1, 0, 1]
    assert rows.rewards.tolist() == [3, 0, -2]
    assert rows.dones.tolist() == [True, True, True]
    assert not rows.truncated.any()
    assert rows.episode_ends.tolist() == [True]
    assert not as_host(Kuhn(2), "kuhn").spec.has_weights  # of two, a fold ends the hand


@pytest.mark.parametrize("bluff", [0.0, 0.2, 1 / 3])
def test_an_equilibrium_gives_the_first_seat_minus_one_eighteenth(bluff: float) -> None:
    strategy = equilibrium(bluff)
    for seat, expected in ((0, -1 / 18), (1, 1 / 18)):
        assert value([strategy] * 2, seat) == pytest.approx(expected, abs=1e-12)
        assert best_response([(1.0, strategy)], seat, 2)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("letter", "num_players", "expected"),
    [
        ("p", 2, 1.0),  # bets and wins every ante
        ("p", 3, 2.0),
        ("b", 2, 1 / 3),  # +2 with the best card, 0 (calls: +2 or -2) with the middle one, -1 with the lowest
        ("b", 3, 1 / 2),  # +4, 0 (+4 in a third of the deals, else -2), -1, -1
    ],
)
def test_the_best_response_to_one_who_always_does_the_same(letter: str, num_players: int, expected: float) -> None:
    for seat in range(num_players):
        found, _ = best_response([(1.0, always(letter, num_players))], seat, num_players)
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("table", ["two", "pool"])
@pytest.mark.parametrize("seat", [0, 1])
def test_no_pure_strategy_of_two_players_beats_the_best_response(table: str, seat: int) -> None:
    npcs = TABLES[table].npcs
    own = [history for history in decision_histories(2) if len(history) % 2 == seat]
    values = []
    for bets in product(list(product((0.0, 1.0), repeat=3)), repeat=2):
        values.append(mean_value(always("p", 2) | dict(zip(own, bets, strict=True)), npcs, seat, 2))
    assert len(values) == 64
    assert best_response(npcs, seat, 2)[0] == pytest.approx(max(values), abs=1e-12)


@pytest.mark.parametrize(("table", "seat"), SEATS)
def test_the_best_response_is_worth_its_value_and_is_no_small_gain(table: str, seat: int) -> None:
    num_players, npcs = TABLES[table].num_players, TABLES[table].npcs
    found, strategy = best_response(npcs, seat, num_players)
    assert mean_value(strategy, npcs, seat, num_players) == pytest.approx(found, abs=1e-12)
    assert found - npc_value(npcs, seat, num_players) > 0.09  # chips a hand
    for card, history in information_sets(num_players):
        bets = list(strategy[history])
        bets[card] = 1.0 - bets[card]
        other = strategy | {history: tuple(bets)}
        assert mean_value(other, npcs, seat, num_players) <= found + 1e-12


@pytest.mark.parametrize("table", TABLES)
def test_what_one_wins_another_loses(table: str) -> None:
    num_players, npcs = TABLES[table].num_players, TABLES[table].npcs
    values = [npc_value(npcs, seat, num_players) for seat in range(num_players)]
    assert sum(values) == pytest.approx(0.0, abs=1e-12)
    assert len({round(one, 3) for one in values}) == num_players  # a swapped seat changes the value


def test_who_meets_another_npc_at_every_action_learns_the_wrong_thing() -> None:
    """So a learner that passes the pool's table has had one NPC for a whole hand."""
    npcs = TABLES["pool"].npcs
    blend = {
        history: tuple(sum(share * npc[history][card] for share, npc in npcs) for card in range(3))
        for history in decision_histories(2)
    }
    wrong = mean_value(best_response([(1.0, blend)], 1, 2)[1], npcs, 1, 2)
    own, best = npc_value(npcs, 1, 2), best_response(npcs, 1, 2)[0]
    assert (wrong - own) / (best - own) < 0.6 < REACHED


@pytest.mark.parametrize("table", TABLES)
def test_the_npcs_file_plays_its_strategy(tmp_path: Path, table: str) -> None:
    for _, npc in TABLES[table].npcs:
        path = tmp_path / "npc.safetensors"
        write_npc(path, npc, TABLES[table].num_players)
        played = read_strategy(str(path), TABLES[table].num_players)
        assert played.keys() == npc.keys()
        for history, bets in npc.items():
            assert played[history] == pytest.approx(bets, abs=1e-6)


@pytest.fixture
def _log_as_before() -> Iterator[None]:
    with logging_as_it_was():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("_log_as_before")
def test_the_learner_finds_the_best_response(tmp_path: Path) -> None:
    outcome = train_and_measure(tmp_path, "pool", seat=1, seed=1)
    assert outcome.npc_value < outcome.value <= outcome.best_value
    assert outcome.gain_fraction >= REACHED
    assert outcome.core_s < LIMIT_S
