"""Cross-play: from records to the table, ratings, worst cases and cycles; sides that are not equal are kept apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dual_policy_plugin import evaluate as evaluation
from dual_policy_plugin.config import Config, DualPolicyConfig, EnvConfig, EvalsConfig, TrainerConfig
from dual_policy_plugin.errors import ConfigError
from dual_policy_plugin.evaluate import cross_play, evaluate, evaluate_pinned
from dual_policy_plugin.evaluation.cross_play import split_sides, summarise
from dual_policy_plugin.evaluation.figure import draw_cross_play
from dual_policy_plugin.evaluation.intervals import wilson_interval
from dual_policy_plugin.evaluation.matches import PairingRecord
from dual_policy_plugin.npc.resolver import PinnedPolicy, resolve
from dual_policy_plugin.rollout.assignment import Assignment, assign
from tests.evaluation.desk import Desk, spies
from tests.harness import CPU

SMALL = {"episode_steps": 48, "num_agents": 4, "height": 8, "width": 8, "mines": 2, "altars": 2, "walls": 0}
CONFIG = Config(env=EnvConfig(num_envs=64, args=SMALL), trainer=TrainerConfig(precision="fp32"))


def pin(name: str, uri: str = "") -> PinnedPolicy:
    return PinnedPolicy(name=name, requested=name, uri=uri or f"file:///{name}", sha256=name * 8, num_bytes=1)


RANDOM = pin("random", "builtin://arena/random")


def record(first: int, second: int, wins: float, draws: int = 0) -> PairingRecord:
    return PairingRecord(
        first=first,
        second=second,
        wins=wins,
        draws=draws,
        episodes=20,
        effective_episodes=20,
        first_return=1.0,
        second_return=0.0,
    )


def test_a_table_by_hand() -> None:
    """Random loses to a (4 : 16), a to b (8 : 12, two draws), b to random (10 : 10)."""
    records = [record(0, 0, 10), record(0, 1, 4), record(0, 2, 10), record(1, 1, 10), record(1, 2, 8, 2)]
    cross = summarise([*records, record(2, 2, 10)], [RANDOM, pin("a"), pin("b")], env="desk", roles=())
    assert cross.win_rate.tolist() == [[0.5, 0.2, 0.5], [0.8, 0.5, 0.4], [0.5, 0.6, 0.5]]
    assert cross.draws.tolist() == [[0, 0, 0], [0, 0, 2], [0, 2, 0]]
    assert (cross.low[1, 0], cross.high[1, 0]) == wilson_interval(16, 20)
    assert cross.low[0, 1] == pytest.approx(1 - cross.high[1, 0])
    assert cross.worst_case == (0.2, 0.4, 0.5)
    assert cross.ratings.names == ("random", "a", "b")
    assert cross.ratings.rating[0] == 0.0
    assert cross.ratings.anchored == (True, False, False)
    assert min(cross.ratings.rating[1:]) > 0
    assert cross.intransitive_share == 0.0  # b and random are even, so there is no triple


def test_a_cycle_is_flagged_and_called_sure_where_it_is() -> None:
    def cycle(wins: float) -> Any:
        own = [record(i, i, 10) for i in range(3)]
        games = [*own, record(0, 1, wins), record(1, 2, wins), record(0, 2, 20 - wins)]
        return summarise(games, [pin("a"), pin("b"), pin("c")], env="desk", roles=())

    assert (cycle(18).intransitive_share, cycle(18).sure_intransitive_share) == (1.0, 1.0)
    assert (cycle(11).intransitive_share, cycle(11).sure_intransitive_share) == (1.0, 0.0)


def test_roles_are_rated_apart() -> None:
    """Whoever attacks wins 15 of 20; random is the weaker in either role."""
    records = [record(0, 0, 15), record(0, 1, 12), record(1, 0, 18), record(1, 1, 15)]
    cross = summarise(records, [RANDOM, pin("a")], env="desk", roles=("attack", "defend"))
    assert cross.win_rate.tolist() == [[0.75, 0.6], [0.9, 0.75]]  # not complementary: other games
    rated = dict(zip(cross.ratings.names, cross.ratings.rating, strict=True))
    assert list(rated) == ["random@attack", "a@attack", "random@defend", "a@defend"]
    assert rated["random@attack"] == 0
    assert cross.ratings.anchored == (True, False, False, False)
    assert rated["a@attack"] > 0 > rated["a@defend"] > rated["random@defend"]
    assert cross.worst_case == (0.6, 0.75, pytest.approx(0.1), 0.25)
    assert cross.as_dict()["roles"] == ["attack", "defend"]


def test_the_anchor_is_the_builtin_and_no_file_of_its_name() -> None:
    records = [record(0, 0, 10), record(0, 1, 4), record(1, 1, 10)]
    for roles in ((), ("attack", "defend")):
        games = [*records, record(1, 0, 16)] if roles else records
        named = summarise(games, [pin("random"), pin("x", "builtin://arena/random")], env="desk", roles=roles)
        rated = dict(zip(named.ratings.names, named.ratings.anchored, strict=True))
        assert [name for name, anchored in rated.items() if anchored] == ["x@attack" if roles else "x"]
    free = summarise(records, [pin("random"), pin("a")], env="desk", roles=())
    assert free.ratings.anchored == (False, False)
    assert sum(free.ratings.rating) == pytest.approx(0)


def test_a_tie_is_half_exactly_however_many_games_it_counts_as() -> None:
    """Rounding that broke ties would make triples, and cycles, of policies that are even."""
    for effective in np.linspace(10, 20, 200).tolist():
        pairs = [replace(record(i, j, 10), effective_episodes=effective) for i in range(3) for j in range(i, 3)]
        cross = summarise(pairs, [RANDOM, pin("a"), pin("b")], env="desk", roles=())
        assert (cross.win_rate == 0.5).all()
        assert cross.intransitive_share == cross.sure_intransitive_share == 0


def test_what_goes_into_the_file() -> None:
    records = [record(0, 0, 10), record(0, 1, 5), record(1, 1, 10)]
    facts = json.loads(json.dumps(summarise(records, [RANDOM, pin("b")], env="desk", roles=()).as_dict()))
    assert facts["policies"] == [
        {"name": "random", "uri": "builtin://arena/random", "sha256": "random" * 8},
        {"name": "b", "uri": "file:///b", "sha256": "b" * 8},
    ]
    assert facts["win_rate"] == [[0.5, 0.25], [0.75, 0.5]]
    assert facts["interval"][1][0] == list(wilson_interval(15, 20))
    assert facts["episodes"] == 20
    assert [(one["name"], one["worst_case"], one["anchored"]) for one in facts["ratings"]] == [
        ("random", 0.25, True),
        ("b", 0.75, False),
    ]
    assert facts["ratings"][1]["low"] < facts["ratings"][1]["rating"] < facts["ratings"][1]["high"]


def test_the_sides() -> None:
    def spec(num_agents: int, roles: tuple[str, ...] = ()) -> Any:
        return Desk([0], num_agents=num_agents, roles=roles).spec

    assert split_sides(spec(4), "first") == (assign(4, 0.5), ())
    assert split_sides(spec(4), "interleaved")[0].learner_seats == (0, 2)
    assert split_sides(spec(3), "first") == (assign(3, 0.5), ("2of3", "1of3"))
    cast = spec(4, ("agent", "adversary", "agent", "judge"))
    assert split_sides(cast, "first") == (
        Assignment(num_agents=4, learner_seats=(0, 2)), ("agent", "adversary+judge")
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"env.name=desk has one agent"):
        split_sides(spec(1), "first")


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Desk]]:
    """Puts desks in the place of the config's env; gives those that were made. Policy k takes action k."""
    made: list[Desk] = []

    def use(**settings: Any) -> list[Desk]:
        def make(config: Any, device: Any, make_host: Any = None) -> Any:
            def of(numbers: Any) -> Desk:
                made.append(Desk(numbers, **settings))
                return made[-1]

            return of

        monkeypatch.setattr(evaluation, "_env_maker", make)
        monkeypatch.setattr(evaluation, "load_pinned", lambda pinned, *rest: spies(*range(len(pinned))))
        return made

    return use


def test_cross_play_with_roles_plays_every_ordered_pair(desk: Callable[..., list[Desk]]) -> None:
    made = desk(roles=("hunter", "hunter", "hunter", "runner"))
    cross = cross_play([pin("a"), pin("b"), pin("c")], CONFIG, episodes=6, seed=1, device=CPU)
    assert cross.roles == ("hunter", "runner")
    assert cross.win_rate.tolist() == [[0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.5]]
    assert made[-1].spec.num_envs == 9 * 6
    hunters, runner = made[-1].played[0][:, :3], made[-1].played[0][:, 3]
    assert sorted(set(zip(hunters[:, 0].tolist(), runner.tolist(), strict=True))) == [
        (i, j) for i in range(3) for j in range(3)
    ]
    assert (hunters == hunters[:, :1]).all()
    assert all(env.is_closed for env in made)


def test_cross_play_with_equal_seats_plays_each_pair_once(desk: Callable[..., list[Desk]]) -> None:
    made = desk()
    cross = cross_play([pin("a"), pin("b"), pin("c")], CONFIG, episodes=6, seed=1, device=CPU)
    assert made[-1].spec.num_envs == 6 * 6
    assert cross.win_rate.tolist() == [[0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.5]]
    assert (np.diag(cross.draws) == 6).all()


def test_a_pinned_policy_sits_where_the_config_says(desk: Callable[..., list[Desk]]) -> None:
    made = desk()
    results = evaluate_pinned(pin("a"), [pin("b"), pin("c")], CONFIG, episodes=6, seed=1, device=CPU)
    assert [(one.win_rate, one.episodes, one.wins) for one in results] == [(0.0, 6, 0.0), (0.0, 6, 0.0)]
    assert [one.opponent for one in results] == ["spy_1", "spy_2"]
    blocks = made[-1].played[0].view(2, 2, 3, 4)  # seating, pairing, env, seat
    assert blocks[0, 0, 0].tolist() == [0, 0, 1, 1]
    assert blocks[1, 1, 2].tolist() == [2, 2, 0, 0]
    dual = DualPolicyConfig(training_agents_pct=0.25, assignment="last")
    config = replace(CONFIG, trainer=replace(CONFIG.trainer, dual_policy=dual))
    evaluate_pinned(pin("a"), [pin("b")], config, episodes=6, seed=1, device=CPU)
    assert made[-1].played[0].tolist() == [[1, 1, 1, 0]] * 6
    everyone = replace(CONFIG.trainer, dual_policy=DualPolicyConfig(training_agents_pct=1.0))
    with pytest.raises(ConfigError, match=r"training_agents_pct=1.0 leaves no seat"):
        evaluate_pinned(pin("a"), [pin("b")], replace(CONFIG, trainer=everyone), episodes=6, seed=1, device=CPU)


def test_a_runs_evaluation_plays_all_opponents_at_once(desk: Callable[..., list[Desk]]) -> None:
    made = desk()
    config = replace(CONFIG, evals=EvalsConfig(episodes=7))
    learner, *opponents = spies(1, 0, 1, 2)
    results = evaluate(learner.policy, opponents, assign(4, 0.5), config, Desk([0]).spec, device=CPU)
    assert len(made) == 1  # one env, and none to ask
    assert [(one.win_rate, one.draws, one.episodes) for one in results] == [(1.0, 0, 8), (0.5, 8, 8), (0.0, 0, 8)]
    assert evaluate(learner.policy, [], assign(4, 0.5), config, Desk([0]).spec, device=CPU) == []
    assert evaluate(learner.policy, opponents, assign(4, 1.0), config, Desk([0]).spec, device=CPU) == []


def test_builtin_policies_end_to_end() -> None:
    pinned = [resolve(f"builtin://arena/{name}") for name in ("random", "forager")]
    cross = cross_play(pinned, CONFIG, episodes=64, seed=1, device=CPU)
    assert cross.win_rate[1, 0] > 0.8
    assert cross.win_rate[1, 0] == 1 - cross.win_rate[0, 1]
    assert np.diag(cross.win_rate).tolist() == [0.5, 0.5]
    (result,) = evaluate_pinned(pinned[1], pinned[:1], CONFIG, episodes=64, seed=1, device=CPU)
    assert result.wins == cross.win_rate[1, 0] * 64 == pytest.approx(result.win_rate * 64)


@pytest.mark.parametrize("num_policies", [2, 12])
@pytest.mark.parametrize("roles", [(), ("hunter$", "rünner")])
def test_the_picture_can_be_drawn(num_policies: int, roles: tuple[str, ...]) -> None:
    numbers = range(num_policies)
    records = [record(i, j, 10 + (i > j) * 5 - (i < j) * 5) for i in numbers for j in numbers if roles or i <= j]
    cross = summarise(records, [pin(f"{'long_' * 8}_{k}") for k in numbers], env="desk", roles=roles)
    data = draw_cross_play(cross)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    assert 500 < width < 2600
    assert 300 < height < 2600
