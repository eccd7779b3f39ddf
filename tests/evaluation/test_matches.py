"""Pairings in one env tensor: who sees which row, equal games for all, what counts, and who won."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import bench_evaluate
from dual_policy_plugin.envs.arena import Arena, make_arena
from dual_policy_plugin.evaluation.intervals import wilson_interval
from dual_policy_plugin.evaluation.matches import (
    CHECK_EVERY,
    Actors,
    PairingRecord,
    effective_episodes,
    match_result,
    plan_rounds,
    play_pairings,
    seatings_of,
)
from dual_policy_plugin.policies.build import build_policy
from dual_policy_plugin.policies.pool import Npc
from dual_policy_plugin.rollout.assignment import Assignment, assign
from dual_policy_plugin.types import StepResult, VecEnv
from tests.evaluation.desk import EPISODE, NUMBER, SEAT, STEP, Desk, spies
from tests.harness import CPU

ARGS = {"episode_steps": 48, "num_agents": 4, "height": 8, "width": 8, "mines": 2, "altars": 2, "walls": 0}
HALVES = (assign(4, 0.5), assign(4, 0.5, "last"))


class Table:
    """Makes one Desk, or arena, and keeps it."""

    def __init__(self, make: Any, **settings: Any) -> None:
        self.make, self.settings = make, settings
        self.env: Any = None

    def __call__(self, numbers: Sequence[int]) -> VecEnv:
        assert self.env is None, "one env for all"
        self.env = self.make(numbers, **self.settings)
        return self.env


class Taped(Arena):
    """An arena that keeps what was done in it."""

    def step(self, actions: torch.Tensor) -> StepResult:
        if not hasattr(self, "tape"):
            self.tape: list[torch.Tensor] = []
        result = super().step(actions)
        self.tape += [actions.clone(), result.rewards.clone(), self.positions.clone()]
        return result


def arena(numbers: Sequence[int]) -> Arena:
    env = make_arena(len(numbers), ARGS, CPU, env_numbers=numbers)
    env.__class__ = Taped
    return env


def arena_policies(*names: str) -> list[Npc]:
    """Scripts by their names, and `fast` policies of random weights."""
    spec, npcs = make_arena(1, ARGS, CPU).spec, []
    for k, name in enumerate(names):
        torch.manual_seed(k)
        args = {"hidden_size": 32} if name == "fast" else {}
        policy = build_policy(name, args, spec.observation_space, spec.actions).eval().requires_grad_(False)
        if name == "fast":
            policy.heads.weight.mul_(20.0)
        policy.pack()
        npcs.append(Npc(name=f"{name}_{k}", policy=policy))
    return npcs


def play(policies: Sequence[Npc], pairings: Sequence[tuple[int, int]], table: Table, **options: Any) -> list[Any]:
    options = {"seatings": HALVES, "episodes": 8, "seed": 3, "max_envs": 1000} | options
    return play_pairings(policies, pairings, table, options.pop("seatings"), device=CPU, **options)


# Who sees which row


@pytest.mark.parametrize("max_envs", [1000, 16, 3])
def test_each_row_goes_through_its_own_policy_once_a_step(max_envs: int) -> None:
    policies, table = spies(0, 1, 2), Table(Desk, lengths=(3, 5))
    pairings = [(0, 1), (2, 0), (1, 1)]
    records = play(policies, pairings, table, max_envs=max_envs, episodes=8)
    assert [record.episodes for record in records] == [8, 8, 8]
    assert table.env.is_closed
    num_envs, num_steps = table.env.spec.num_envs, len(table.env.played)
    assert num_envs <= max_envs
    rows = [torch.cat(npc.policy.seen) for npc in policies]
    assert sum(map(len, rows)) == num_envs * 4 * num_steps
    if max_envs == 3:  # 6 blocks go in two groups of 3, four rounds of one env each
        assert (num_envs, len(table.env.seeds)) == (3, 8)
        return
    first, last = {0, 1}, {2, 3}
    seats = {0: [first, last, last, first], 1: [last, first, first, last, first, last], 2: [first, last]}
    num_numbers = num_envs // 6
    for k, npc in enumerate(policies):
        expected = Counter(
            (number, seat) for seats_of in seats[k] for seat in seats_of for number in range(num_numbers)
        )
        for seen in npc.policy.seen:
            assert Counter(zip(seen[:, NUMBER].int().tolist(), seen[:, SEAT].int().tolist(), strict=True)) == expected


def test_states_begin_at_zero_in_every_round_and_episode() -> None:
    policies = spies(0, None)
    play(policies, [(0, 1)], Table(Desk, lengths=(2, 3)), episodes=8, max_envs=4)
    for npc in policies:
        for seen, states in zip(npc.policy.seen, npc.policy.states, strict=True):
            assert torch.equal(states[:, 0], seen[:, STEP])


def test_a_round_stops_soon_after_all_first_episodes_have_ended() -> None:
    table = Table(Desk, lengths=(2, CHECK_EVERY + 1))
    play(spies(0, 1), [(0, 1)], table, episodes=4)
    assert len(table.env.played) == 2 * CHECK_EVERY  # of 64 that an episode may last
    play(spies(0, 1), [(0, 1)], table := Table(Desk, lengths=(2, 3)), episodes=4)
    assert len(table.env.played) == CHECK_EVERY


def test_a_pool_each_acts_as_one_pool_does() -> None:
    """What a GPU does: each policy is called once a step, with its own rows alone."""
    policies, env = arena_policies("fast", "mlp", "fast"), arena(range(8))
    env.reset(1)
    policy_of_row = torch.arange(32) * 7 % 3
    one, many = (Actors(policies, policy_of_row, CPU, are_pooled=are_pooled) for are_pooled in (True, False))
    obs = torch.zeros(32, 128, dtype=torch.uint8)
    for t in range(12):
        env.observe(torch.arange(4), obs)
        uniforms = torch.rand(32, generator=torch.Generator().manual_seed(t))
        actions = one.act(obs, uniforms)
        assert torch.equal(actions, many.act(obs, uniforms))
        for actors in (one, many):
            actors.end_step(torch.arange(32) % 5 == t)
        env.step(actions.view(8, 4))
    seen = spies(0, 1, 2)
    Actors(seen, policy_of_row, CPU, are_pooled=False).act(policy_of_row.view(32, 1).expand(32, 4).float(), uniforms)
    for k, npc in enumerate(seen):
        assert (npc.policy.seen[0] == k).all()
        assert len(npc.policy.seen[0]) == int((policy_of_row == k).sum())


# Equal games


def test_all_pairings_and_seatings_have_the_same_starts() -> None:
    table = Table(arena)
    play(arena_policies("random", "forager"), [(0, 1), (0, 0), (1, 1)], table, episodes=6)
    env = table.env
    assert env.env_numbers.tolist() == [0, 1, 2] * 6
    env.reset(11)
    blocks = env.views.view(6, 3, -1)
    assert (blocks == blocks[:1]).all()
    assert not torch.equal(blocks[0, 0], blocks[0, 1])


@pytest.mark.parametrize("name", ["fast", "random", "forager"])
def test_a_policy_against_itself_wins_exactly_half(name: str) -> None:
    """Both seatings are one game, bit for bit, in which the sides have changed names."""
    table = Table(arena)
    policies = arena_policies(name, "fast", "fast")
    (record, _, twin) = play(policies, [(0, 0), (0, 1), (2, 2)], table, episodes=100)
    assert record.wins == twin.wins == 50.0
    assert record.first_return == record.second_return
    for tensor in table.env.tape:
        blocks = tensor.view(2, 3, 50, 4)
        if tensor.dtype == torch.int64 and tensor.max() > 5:  # places: those of a block lie behind those of another
            blocks = blocks % (table.env.views.shape[2])
        assert torch.equal(blocks[0, 0], blocks[1, 0])
        assert torch.equal(blocks[0, 2], blocks[1, 2])


def test_swapping_names_and_seatings_gives_the_same_games() -> None:
    policies = arena_policies("fast", "fast", "forager")
    one, other = Table(arena), Table(arena)
    records = play(policies, [(0, 1), (1, 2)], one, episodes=60)
    swapped = play(policies, [(1, 0), (2, 1)], other, episodes=60, seatings=HALVES[::-1])
    for ours, theirs in zip(one.env.tape, other.env.tape, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(records, swapped, strict=True):
        assert (ours.first, ours.second) == (theirs.second, theirs.first)
        assert (ours.wins, ours.draws) == (theirs.episodes - theirs.wins, theirs.draws)
        assert (ours.first_return, ours.second_return) == (theirs.second_return, theirs.first_return)
    assert any(record.wins != 30 for record in records)


def test_other_pairings_beside_it_do_not_change_a_pairing() -> None:
    policies = arena_policies("random", "forager", "fast")
    alone = play(policies, [(0, 1)], Table(arena), episodes=40)
    beside = play(policies, [(2, 2), (0, 1), (1, 2)], Table(arena), episodes=40)
    assert alone[0] == beside[1]


def test_the_seed_decides() -> None:
    def games(seed: int, max_envs: int = 1000) -> PairingRecord:
        return play(arena_policies("random", "random"), [(0, 1)], Table(arena), seed=seed, max_envs=max_envs)[0]

    assert games(5) == games(5)
    assert games(5) != games(6)
    assert games(5, max_envs=4) != games(6, max_envs=4)
    table = Table(Desk)
    play(spies(0, 1), [(0, 1)], table, episodes=24, max_envs=4)
    assert len(set(table.env.seeds)) == 6  # each round has episodes of its own


# What counts


def test_first_episodes_count_once_whatever_their_length() -> None:
    """Env 0's episodes last 1 step, env 1's 4: side 1 gets 2 a step, side 0 gets 1."""
    policies = spies(1, 2)
    (record,) = play(policies, [(0, 1)], Table(Desk, lengths=(1, 4)), episodes=4)
    assert record == PairingRecord(
        first=0, second=1, wins=0.0, draws=0, episodes=4, effective_episodes=2.0, first_return=2.5, second_return=5.0
    )
    assert max(int(seen[:, EPISODE].max()) for seen in policies[0].policy.seen) > 3  # many more were begun


@pytest.mark.parametrize("max_envs", [1000, 4])  # 4: two groups of three blocks
@pytest.mark.parametrize("num_more", [0, 2])  # 2: with max_envs=4 three groups, the last of which is not full
def test_wins_by_hand_and_draws_as_half(max_envs: int, num_more: int) -> None:
    pairings = [(0, 1), (1, 2), (3, 1), (2, 0), (0, 3)][: 3 + num_more]
    records = play(spies(0, 1, 1, 2), pairings, Table(Desk), episodes=6, max_envs=max_envs)
    expected = [(0.0, 0), (3.0, 6), (6.0, 0), (6.0, 0), (0.0, 0)][: 3 + num_more]
    assert [(record.wins, record.draws) for record in records] == expected
    assert all(record.episodes == 6 for record in records)


def test_means_are_compared_where_sides_have_different_sizes() -> None:
    (record,) = play(spies(1, 1), [(0, 1)], Table(Desk), seatings=[assign(4, 0.25)])
    assert (record.wins, record.draws) == (4.0, 8)
    (record,) = play(spies(2, 1), [(0, 1)], Table(Desk), seatings=[assign(4, 0.25)])
    assert (record.wins, record.first_return, record.second_return) == (8.0, 6.0, 3.0)


def test_the_envs_own_scores_decide_where_it_gives_some() -> None:
    records = play(
        spies(0, 2), [(0, 1)], Table(Desk, scores=(1.0, 1.0, 0.0, 0.0)), seatings=HALVES[:1]
    ) + play(spies(0, 2), [(0, 1)], Table(Desk, scores=(1.0, 0.0, 0.0, 1.0)))  # fmt: skip
    assert [(record.wins, record.draws) for record in records] == [(8.0, 0), (4.0, 8)]
    assert records[0].second_return == 6.0


def test_the_stronger_wins() -> None:
    records = play(arena_policies("forager", "random"), [(0, 1), (1, 0)], Table(arena), episodes=200)
    strong, weak = (match_result(record, "other") for record in records)
    assert strong.episodes == weak.episodes == 200
    assert strong.win_rate == strong.wins / 200 > 0.9
    assert weak.win_rate == pytest.approx(1 - strong.win_rate)
    assert strong.low < strong.win_rate <= strong.high
    assert strong.learner_return > strong.opponent_return
    assert strong.draws == weak.draws


# Seats and rounds


def test_both_seatings_where_the_sides_are_equal() -> None:
    def spec(roles: tuple[str, ...] = ()) -> Any:
        return Desk([0], roles=roles).spec

    split = assign(4, 0.5, [0, 3])
    assert seatings_of(split, spec()) == (split, Assignment(num_agents=4, learner_seats=(1, 2)))
    assert len(seatings_of(split, spec(("a", "a", "b", "b")))) == 2  # one of each role on both sides
    assert seatings_of(assign(4, 0.5), spec(("a", "a", "b", "b"))) == (assign(4, 0.5),)
    assert seatings_of(assign(4, 0.25), spec()) == (assign(4, 0.25),)


def test_rounds_by_hand() -> None:
    def plan(*args: int) -> tuple[int, int, int]:
        made = plan_rounds(*args)
        return made.num_blocks, made.envs_per_block, made.num_rounds

    assert plan(2, 100, 200) == (2, 100, 1)
    assert plan(2, 101, 200) == (2, 51, 2)  # not 100 and then one
    assert plan(10, 7, 30) == (10, 3, 3)
    assert plan(10, 7, 4) == (4, 1, 7)  # three groups, the last of them with two that are left over


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 200))
def test_rounds_play_enough_and_fit(num_blocks: int, games: int, max_envs: int) -> None:
    plan = plan_rounds(num_blocks, games, max_envs)
    assert plan.num_blocks * plan.envs_per_block <= max_envs
    assert games <= plan.envs_per_block * plan.num_rounds < games + plan.num_rounds


def test_policies_of_one_size_act_in_one_grouped_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has as many slots as there are rows, and the tiles' fillers."""
    from dual_policy_plugin.policies import stacked

    slots: list[int] = []
    step = stacked.StackedPolicies.step

    def counted(self: Any, obs: Any, state: Any, rows: Any) -> Any:
        slots.append(len(rows.row_of_slot))
        assert len(obs) == 3 * 20 * 4
        return step(self, obs, state, rows)

    monkeypatch.setattr(stacked.StackedPolicies, "step", counted)
    play(arena_policies("fast", "fast", "fast"), [(0, 1), (1, 2), (2, 0)], Table(arena), episodes=20)
    assert len(slots) == 48
    assert max(slots) < 240 + 3 * stacked.TILE


def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    bench_evaluate.main(["--policies", "2", "--num-envs", "6", "--episode-steps", "4", "--rounds", "1"])
    assert "2 policies, 3 pairings, 6 envs of 8 agents, 1 thread(s), cpu: cross-play " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scores", "num_seatings", "games"),
    [
        ([1.0, 0.0, 1.0, 0.0], 2, 4.0),  # both seatings of a start always end alike: starts count, not games
        ([0.5, 0.5, 0.5, 0.5], 2, 8.0),  # one win each, or draws: at least as sure as independent games
        ([1.0, 1.0, 1.0, 1.0], 2, 4.0),  # nothing tells
        ([1.0, 0.0, 0.0, 0.0], 1, 4.0),  # one seating: every game is a start
        ([1.0, 0.5, 0.5, 0.0], 2, 6.0),  # 4 starts * 1/4 / (1/6), as independent coins would give about 8
    ],
)
def test_effective_number_of_games_by_hand(scores: list[float], num_seatings: int, games: float) -> None:
    assert effective_episodes(torch.tensor([scores], dtype=torch.float64), num_seatings) == [pytest.approx(games)]


@pytest.mark.parametrize("alike", [0.0, 0.6])
def test_intervals_cover_the_win_rate_where_seatings_of_a_start_end_alike(alike: float) -> None:
    """2,000 matches of 100 starts from two seatings; with `alike` the second game repeats the first one."""
    generator = torch.Generator().manual_seed(1)
    first = torch.rand(2000, 100, generator=generator) < 0.7
    second = torch.rand(2000, 100, generator=generator) < 0.7
    second = torch.where(torch.rand(2000, 100, generator=generator) < alike, first, second)
    scores = (first.double() + second.double()) / 2
    games = effective_episodes(scores, 2)
    rates = scores.mean(dim=1).tolist()
    bounds = [wilson_interval(rate * played, played) for rate, played in zip(rates, games, strict=True)]
    covered = sum(low <= 0.7 <= high for low, high in bounds) / 2000
    assert 0.935 < covered < 0.975
    if alike:  # as independent games the intervals would be too narrow
        naive = [wilson_interval(rate * 200, 200) for rate in rates]
        assert sum(low <= 0.7 <= high for low, high in naive) / 2000 < 0.9
