"""The MettaGrid game: its rules, its observations, its episodes, and its seats."""

import sys

import numpy as np
import pytest
import torch
from toy_envs import play, step

from dual_policy_plugin.config import EnvConfig
from dual_policy_plugin.envs.build import make_env
from dual_policy_plugin.envs.mettagrid import MettagridConfig, MettagridHost, make, tokens_needed
from dual_policy_plugin.errors import ConfigError, EnvError

NOOP, NORTH, SOUTH, WEST, EAST = range(5)
GLOBAL, PADDING = 0xFE, 0xFF


def places(host):
    """(row, column) of each seat's agent."""
    found = {
        item["agent_id"]: item["location"] for item in host.simulation.grid_objects().values() if "agent_id" in item
    }
    return [(found[agent][1], found[agent][0]) for agent in host.agent_of_seat.tolist()]


def things(host, kind):
    return {
        (item["location"][1], item["location"][0])
        for item in host.simulation.grid_objects().values()
        if item["type_name"] == kind
    }


def quiet(**args):
    """A game without mines, altars or walls inside."""
    return make(0, **{"mines": 0, "altars": 0, "walls": 0, "steps": 64} | args)


def test_the_spaces_are_named():
    host = make(0)
    assert host.spec.actions == ("noop", "move_north", "move_south", "move_west", "move_east")
    space = host.spec.observation_space
    assert (space.kind, space.window, space.dtype) == ("tokens", (11, 11), "uint8")
    assert space.shape == (tokens_needed(MettagridConfig()), 3)
    scales = dict(zip(space.features, space.scales, strict=True))
    assert {"type:agent", "type:altar", "type:mine", "type:wall", "last_action:noop"} <= set(scales)
    assert (scales["inv:ore"], scales["inv:heart"], scales["type:agent"]) == (5, 16, 1)  # limit, stock, yes or no
    assert "agent_id" not in scales


def test_each_action_moves_its_own_seat_and_no_other():
    host = quiet(num_agents=4, size=12)
    runner, rows = play(host)
    mover = 2
    moved = 0
    for action, row, column in ((NORTH, -1, 0), (SOUTH, 1, 0), (WEST, 0, -1), (EAST, 0, 1)) * 2:
        before = places(host)
        actions = [NOOP] * 4
        actions[mover] = action
        step(runner, rows, *actions)
        after = places(host)
        assert [place for seat, place in enumerate(after) if seat != mover] == [
            place for seat, place in enumerate(before) if seat != mover
        ]
        goal = (before[mover][0] + row, before[mover][1] + column)
        free = goal not in before and goal not in things(host, "wall")
        assert after[mover] == (goal if free else before[mover])
        moved += free
    assert moved >= 6


def test_the_seats_that_always_go_north_end_at_the_north_wall():
    host = quiet(num_agents=4, size=10)
    runner, rows = play(host)
    start = places(host)
    for _ in range(12):
        step(runner, rows, NOOP, NOOP, NORTH, NORTH)
    end = places(host)
    assert end[:2] == start[:2]
    blocked = {(row + 1, column) for row, column in end}
    assert all(row == 1 or (row, column) in blocked for row, column in end[2:])


def test_a_location_byte_is_row_and_column_of_the_window():
    host = make(0, num_agents=2, size=8, mines=5, altars=3, walls=4)
    _, rows = play(host)
    features = host.spec.observation_space.features
    for seat, (row, column) in enumerate(places(host)):
        seen = rows.observations[seat]
        for kind in ("wall", "mine", "altar"):
            tokens = seen[seen[:, 1] == features.index(f"type:{kind}")]
            assert (tokens[:, 2] == 1).all()
            cells = {(row + (int(where) >> 4) - 5, column + (int(where) & 15) - 5) for where in tokens[:, 0]}
            visible = {cell for cell in things(host, kind) if max(abs(cell[0] - row), abs(cell[1] - column)) <= 5}
            near = {cell for cell in visible if (cell[0] - row) ** 2 + (cell[1] - column) ** 2 <= 25}
            assert near <= cells <= visible, kind  # MettaGrid leaves the corners of the window out
        me = seen[(seen[:, 0] == 0x55) & (seen[:, 1] == features.index("type:agent"))]
        assert me[:, 2].tolist() == [1]  # the centre of the window
        assert (seen[seen[:, 0] == PADDING] == PADDING).all()
        assert (seen[seen[:, 0] != PADDING][:, 1] < len(features)).all()
        assert seen[0, 0] == GLOBAL


def test_what_an_agent_did_carries_and_got_is_seen_by_name():
    """One agent between a mine and an altar: its tokens are followed through ore and heart."""
    host = make(0, num_agents=1, size=3, mines=1, altars=1, walls=0, hearts=2, steps=500)
    runner, rows = play(host)
    features = host.spec.observation_space.features
    generator = np.random.default_rng(1)
    seen_ore, hearts, acted = set(), 0, 0
    for _ in range(300):
        action = int(generator.integers(0, 5))
        step(runner, rows, action)
        tokens = {(where, features[name]): value for where, name, value in rows.observations[0].tolist() if name < 255}
        last = [name for _, name in tokens if name.startswith("last_action:")]
        assert last in ([f"last_action:{host.spec.actions[action]}"], ["last_action:noop"])  # noop: it was blocked
        acted += last[0] != "last_action:noop"
        hearts += int(rows.rewards[0])
        assert tokens.get((0x55, "inv:heart"), 0) == hearts
        seen_ore.add(tokens.get((0x55, "inv:ore"), 0))
    assert acted > 100
    assert hearts == 2
    assert seen_ore == {0, 1, 2, 3, 4, 5}


def test_ore_becomes_a_heart_and_a_heart_is_the_reward():
    """A random walk in a crowded game: reward is exactly the hearts, hearts are no more than ore and than the stock."""
    host = make(0, num_agents=4, size=6, mines=5, altars=2, walls=0, hearts=3, steps=400)
    runner, rows = play(host)
    generator = np.random.default_rng(3)
    total = np.zeros(4)
    for _ in range(400):
        step(runner, rows, *generator.integers(0, 5, 4))
        total += rows.rewards
    assert rows.episode_ends.all()
    assert rows.counters[:, 0].tolist() == total.tolist()
    assert total.sum() == 6  # the stock is finite: 2 altars of 3
    assert (rows.counters[:, 1] >= rows.counters[:, 0]).all()
    assert host.spec.counters == ("hearts", "ore")


def test_an_episode_is_truncated_with_its_final_observation():
    host = make(0, num_agents=3, size=8, steps=5)
    runner, rows = play(host)
    done_feature = host.spec.observation_space.features.index("episode_completion_pct")
    for _ in range(4):
        step(runner, rows, NOOP, NOOP, NOOP)
        assert not rows.dones.any()
        assert not rows.truncated.any()
    step(runner, rows, NORTH, NORTH, NORTH)
    assert rows.dones.all()
    assert rows.truncated.all()
    assert rows.episode_ends.all()
    time_left = [rows.final_observations[:, 0], rows.observations[:, 0]]
    assert (time_left[0][:, 1] == done_feature).all()
    assert (time_left[0][:, 2] > 200).all()  # the end of the old episode
    assert (time_left[1][:, 2] == 0).all()  # the start of the new one
    assert host.simulation.current_step == 0


def test_same_seed_same_map_other_seed_other_map():
    maps = []
    for seed in (4, 4, 5):
        host = make(0)
        play(host, seed=seed)
        maps.append([sorted(things(host, kind)) for kind in ("wall", "mine", "altar")] + [places(host)])
    assert maps[0] == maps[1]
    assert maps[0][1] != maps[2][1]


def test_no_seat_has_its_own_region_and_no_observation_its_number():
    host = quiet(num_agents=4, size=12)
    assert "agent_id" not in host.spec.observation_space.features
    rows_of_seat = np.zeros(4)
    for seed in range(200):
        play(host, seed=seed)
        rows_of_seat += [row for row, _ in places(host)]
    # Mean row is 6.5; one seat's mean over 200 maps has a standard error of 3.45 / sqrt(200) = 0.24.
    assert (np.abs(rows_of_seat / 200 - 6.5) < 1.0).all()


def test_agent_numbers_can_be_kept():
    host = make(0, num_agents=4, size=6, agent_numbers=True)
    _, rows = play(host)
    feature = host.spec.observation_space.features.index("agent_id")
    seen = rows.observations[rows.observations[..., 1] == feature]
    assert set(seen[:, 2]) == {0, 1, 2, 3}


@pytest.mark.parametrize("args", [{}, {"size": 6, "walls": 4}, {"size": 4, "walls": 0, "mines": 4, "num_agents": 4}])
def test_tokens_always_suffice(args):
    host = make(0, **args | {"hearts": 600})
    runner, rows = play(host)
    generator = np.random.default_rng(0)
    used = 0
    for _ in range(300):
        step(runner, rows, *generator.integers(0, 5, host.spec.num_agents))
        used = max(used, int((rows.observations[..., 0] != PADDING).sum(1).max()))
        assert host.simulation._c_sim.get_game_stat("tokens_dropped") in (None, 0.0)
    assert used <= host.spec.observation_space.shape[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"size": 2}, "env.size=2 is not possible; use a value from 3 to 200"),
        ({"size": 4}, "env.size=4 is not possible; 28 agents and objects do not fit into 16 cells"),
        ({"window": 10}, "env.window=10 is not possible; use an odd number"),
        ({"num_tokens": 20}, "env.num_tokens=20 is not possible; use at least 99, or null"),
        ({"size": "big"}, "env.size=big is not possible; use a whole number"),
        ({"num_agent": 4}, "env.num_agent is no setting of env.name=mettagrid; did you mean num_agents?"),
    ],
)
def test_bad_args_are_named_before_any_worker_starts(args, message):
    with pytest.raises(ConfigError) as caught:
        make_env(EnvConfig(name="mettagrid", args=args), device="cpu", num_workers=1)
    assert str(caught.value) == message


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mettagrid.simulator.simulator", None)
    with pytest.raises(EnvError, match=r"^env.name=mettagrid cannot be imported .* pip install mettagrid==0.26.22$"):
        make(0)


def test_two_workers_play_what_one_plays():
    seen = []
    for num_workers in (1, 2):
        env = make_env(
            EnvConfig(name="mettagrid", num_envs=3, args={"steps": 16, "num_tokens": None}),
            device="cpu",
            num_workers=num_workers,
        )
        try:
            env.reset(7, stagger=True)
            generator = torch.Generator().manual_seed(0)
            out = torch.zeros(24, *env.spec.observation_space.shape, dtype=torch.uint8)
            record = []
            for _ in range(40):
                result = env.step(torch.randint(0, 5, (3, 8), generator=generator))
                env.observe(torch.arange(8), out)
                record += [out.clone(), result.rewards.clone(), result.truncated.clone()]
            seen.append(record)
        finally:
            env.close()
    assert all(torch.equal(one, two) for one, two in zip(*seen, strict=True))
    assert isinstance(make(0), MettagridHost)
