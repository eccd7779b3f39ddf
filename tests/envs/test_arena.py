"""The arena as a whole: same seed same episode, no seat is special, nothing comes from nowhere, config is checked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dual_policy_plugin.envs.arena import Arena, make_arena
from dual_policy_plugin.envs.arena_config import ArenaConfig, parse_arena_args
from dual_policy_plugin.envs.arena_maps import MARGIN
from dual_policy_plugin.envs.arena_text import show_map
from dual_policy_plugin.errors import ConfigError, RunError

SMALL = {"num_agents": 4, "height": 6, "width": 7, "mines": 2, "altars": 2, "walls": 1, "episode_steps": 20}


def random_actions(steps, envs, agents, seed=0):
    return torch.randint(0, 6, (steps, envs, agents), generator=torch.Generator().manual_seed(seed))


def play(arena, actions):
    """Everything an arena gives: observations before and results after each step."""
    envs, agents = actions.shape[1:]
    seen = torch.zeros(envs * agents, 128, dtype=torch.uint8)
    history = []
    for chosen in actions:
        arena.observe(torch.arange(agents), seen)
        result = arena.step(chosen)
        outcome = (result.rewards, result.dones, result.episode_ends)
        history.append((seen.view(envs, agents, 128).clone(), *(part.clone() for part in outcome)))
    return [torch.stack(parts) for parts in zip(*history, strict=True)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("stagger", [False, True])
def test_same_seed_and_actions_give_the_same_episodes(stagger):
    actions = random_actions(50, 5, 4)
    arena = Arena(ArenaConfig(**SMALL), 5)
    arena.reset(3, stagger=stagger)
    first = play(arena, actions)
    arena.reset(3, stagger=stagger)
    assert same(first, play(arena, actions))
    arena.reset(4, stagger=stagger)
    assert not torch.equal(first[0], play(arena, actions)[0])


def test_an_env_depends_on_its_global_number_alone():
    actions = random_actions(50, 9, 4)
    config = ArenaConfig(**SMALL)
    whole, part = Arena(config, 9), Arena(config, 4, env_numbers=range(5, 9))
    whole.reset(1, stagger=True)
    part.reset(1, stagger=True)
    whole_history, part_history = play(whole, actions), play(part, actions[:, 5:])
    assert same([history[:, 5:] for history in whole_history], part_history)


def test_envs_of_one_number_play_one_episode():
    config, numbers = ArenaConfig(**SMALL), [7, 2, 7, 2]
    actions = random_actions(50, 9, 4)
    whole, repeated = Arena(config, 9), Arena(config, 4, env_numbers=numbers)
    whole.reset(1)
    repeated.reset(1)
    whole_history, history = play(whole, actions), play(repeated, actions[:, numbers])
    assert same([part[:, numbers] for part in whole_history], history)


def test_no_two_envs_and_no_two_episodes_are_alike():
    arena = Arena(ArenaConfig(), 64)
    arena.reset(1)
    maps = {show_map(arena, env) for env in range(64)}
    for step in range(128):
        arena.step(torch.zeros(64, 8, dtype=torch.int64))
        assert arena.result.episode_ends.all() == (step == 127)
    maps |= {show_map(arena, env) for env in range(64)}
    assert len(maps) == 128


def test_permuted_seats_give_the_permuted_episodes():
    actions = random_actions(60, 6, 8)
    config = ArenaConfig(height=8, width=8, episode_steps=25, walls=2, teams=[0, 1, 1, 0, 0, 0, 1, 1])
    keys = [5, 3, 1000, -7, 8, 0, 2, 11]
    order = [3, 0, 7, 6, 1, 5, 4, 2]
    permuted_config = ArenaConfig(
        height=8, width=8, episode_steps=25, walls=2, teams=[config.teams[seat] for seat in order]
    )
    arena = Arena(config, 6, seat_keys=keys)
    permuted = Arena(permuted_config, 6, seat_keys=[keys[seat] for seat in order])
    arena.reset(2, stagger=True)
    permuted.reset(2, stagger=True)
    history, permuted_history = play(arena, actions), play(permuted, actions[:, :, order])
    assert same([part[:, :, order] for part in history[:3]], permuted_history[:3])
    assert torch.equal(arena.totals[:, :, order], permuted.totals)
    assert arena.totals[3].sum() > 0  # somebody was frozen


def test_swapped_teams_give_the_same_episodes():
    actions = random_actions(60, 6, 8)
    histories = []
    for teams in ([0, 0, 1, 0, 1, 1, 1, 0], [1, 1, 0, 1, 0, 0, 0, 1]):
        arena = Arena(ArenaConfig(height=8, width=8, walls=2, teams=teams), 6)
        arena.reset(2)
        histories.append(play(arena, actions))
    assert same(*histories)


def test_seats_are_observed_as_asked_and_env_major():
    arena = Arena(ArenaConfig(), 3)
    arena.reset(5)
    every = torch.zeros(24, 128, dtype=torch.uint8)
    arena.observe(torch.arange(8), every)
    some = torch.full((9, 128), 77, dtype=torch.uint8)
    arena.observe(torch.tensor([6, 0, 3]), some)
    assert torch.equal(some.view(3, 3, 128), every.view(3, 8, 128)[:, [6, 0, 3]])
    before = some.clone()
    arena.observe_final(torch.tensor([6, 0, 3]), some)
    assert torch.equal(some, before)


class Ledger:
    """What must hold after every step, whatever the actions."""

    def __init__(self, arena):
        self.arena = arena
        self.ore, self.stock = arena.ore.sum(1).long(), self.stock_left()

    def stock_left(self):
        is_altar = self.arena.views[:, 0] == 3
        return (self.arena.amounts * is_altar).sum(1).long()

    def check(self, result, mined_before):
        arena, config = self.arena, self.arena.config
        hearts = result.rewards.sum(1).long()
        mined = arena.totals[1].sum(1).long() - mined_before
        stock, ore = self.stock_left(), arena.ore.sum(1).long()
        going_on = ~result.episode_ends
        assert torch.equal((self.stock - stock)[going_on], hearts[going_on])
        # ore comes from mines, goes into hearts, and may be lost in a robbery, never made
        assert (ore <= self.ore + mined - hearts)[going_on].all()
        lossless = going_on & (arena.totals[2].sum(1) == 0)
        assert torch.equal(ore[lossless], (self.ore + mined - hearts)[lossless])
        assert arena.ore.max() <= config.ore_capacity
        assert arena.frozen.max() <= config.freeze_steps
        assert arena.cooldown.max() <= config.attack_cooldown
        assert torch.equal(arena.totals[0].sum(1).long() + stock, torch.full_like(stock, self.total_stock()))
        agents = arena.views.view(-1)[arena.view_cells]
        assert ((agents[0] == 4) | (agents[0] == 6)).all()
        assert ((agents[1] == 5) | (agents[1] == 7)).all()
        assert ((arena.views >= 4).sum((1, 2)) == 2 * config.num_agents).all()
        assert torch.equal(arena.amounts.view(-1)[arena.positions], arena.ore)
        assert (arena.claims == -1).all()
        self.ore, self.stock = ore, stock

    def total_stock(self):
        return self.arena.config.altars * self.arena.config.altar_stock


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31 - 1),
    agents=st.integers(2, 12),
    stock=st.integers(1, 3),
    capacity=st.integers(1, 4),
    freeze=st.integers(1, 5),
    cooldown=st.integers(0, 4),
    stagger=st.booleans(),
)
def test_nothing_comes_from_nowhere(seed, agents, stock, capacity, freeze, cooldown, stagger):
    config = ArenaConfig(
        num_agents=agents, height=6, width=6, mines=2, altars=2, walls=2, altar_stock=stock, ore_capacity=capacity,
        freeze_steps=freeze, attack_cooldown=cooldown, episode_steps=30,
    )  # fmt: skip
    arena = Arena(config, 4)
    arena.reset(seed, stagger=stagger)
    ledger = Ledger(arena)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(45):
        ahead = arena.positions + arena.offsets[arena.facings] + arena.to_views[0]
        codes = arena.views.view(-1)[ahead]
        actions = torch.randint(0, 6, (4, agents), generator=generator)
        useful = (codes == 2) | (codes == 3)
        actions = torch.where(codes == 5, 5, torch.where(useful & (actions > 1), arena.facings, actions))
        mined_before = arena.totals[1].sum(1).long()
        ledger.check(arena.step(actions), mined_before)


def test_counters_are_the_episodes_totals():
    arena = Arena(ArenaConfig(**SMALL), 5)
    arena.reset(3)
    for _ in range(3):
        hearts = torch.zeros(5, 4)
        for actions in random_actions(20, 5, 4):
            hearts += arena.step(actions).rewards
        assert arena.result.episode_ends.all()
        assert torch.equal(arena.result.counters[:, :, 0], hearts)
        _, _, attacks, frozen = arena.result.counters.sum((0, 1)).tolist()
        assert attacks >= frozen > 0
        assert not arena.totals.any()


def test_stagger_spreads_the_ends_over_the_clock():
    arena = Arena(ArenaConfig(episode_steps=128), 1024)
    arena.reset(1)
    assert (arena.steps_left == 128).all()
    arena.reset(1, stagger=True)
    counts = torch.bincount(arena.steps_left, minlength=129)
    assert counts[0] == 0
    assert counts[1:].min() >= 7  # 8 on average
    assert counts[1:].max() <= 9
    expected = (255 * arena.steps_left + 127) // 128
    assert torch.equal(arena.time_left[:, 0].int(), expected)
    assert (arena.steps_left.diff().abs() > 5).all()
    ends = torch.stack([arena.step(actions).episode_ends.clone() for actions in random_actions(128, 1024, 8)])
    assert (ends.sum(0) == 1).all()
    assert ends.sum(1).max() <= 9
    # from the second episode on, all have their full length
    for _ in range(128):
        arena.step(torch.zeros(1024, 8, dtype=torch.int64))
    assert (arena.episodes == 2).all()


@pytest.mark.parametrize("stagger", [False, True])
def test_the_path_without_host_branches_gives_the_same(stagger):
    actions = random_actions(70, 7, 4)
    config = ArenaConfig(**SMALL)
    histories = []
    for fixed_shapes in (False, True):
        arena = Arena(config, 7)
        arena._fixed_shapes = fixed_shapes
        arena.reset(9, stagger=stagger)
        histories.append(play(arena, actions))
        assert (arena.episodes >= 3).all()
    assert same(*histories)


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_a_loaded_state_goes_on_as_if_never_interrupted(fixed_shapes):
    actions = random_actions(60, 5, 4)
    config = ArenaConfig(**SMALL)
    arena, other = Arena(config, 5), Arena(config, 5)
    other._fixed_shapes = fixed_shapes
    arena.reset(3, stagger=True)
    play(arena, actions[:25])
    state = arena.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    expected = play(arena, actions[25:])
    other.reset(99)
    views = other.views.data_ptr()
    other.load_state_dict(state)
    assert other.views.data_ptr() == views
    assert same(expected, play(other, actions[25:]))


def test_a_state_of_another_arena_is_refused():
    state = Arena(ArenaConfig(**SMALL), 5).state_dict()
    with pytest.raises(RunError, match=r"arena state: views is torch.uint8 \(5, 2, 272\), expected .*\(6, 2, 272\)"):
        Arena(ArenaConfig(**SMALL), 6).load_state_dict(state)
    del state["facings"]
    with pytest.raises(RunError, match="arena state: facings is missing"):
        Arena(ArenaConfig(**SMALL), 5).load_state_dict(state)


@pytest.mark.parametrize(
    "size", [(14, 14, 4, 4, 10, 8), (9, 12, 3, 3, 18, 30), (4, 4, 1, 1, 2, 12), (5, 64, 8, 8, 48, 64)]
)
def test_maps_have_what_was_asked_for_and_everything_can_be_reached(size):
    height, width, mines, altars, walls, agents = size
    config = ArenaConfig(height=height, width=width, mines=mines, altars=altars, walls=walls, num_agents=agents)
    arena = Arena(config, 64)
    arena.reset(1)
    for env in range(64):
        rows = show_map(arena, env).split()
        text = "".join(rows)
        assert (text.count("M"), text.count("A"), text.count("#")) == (mines, altars, walls)
        inner = arena.views[env, 0].view(-1, arena.drawer.stride)[MARGIN:-MARGIN, MARGIN:-MARGIN]
        assert (inner == 4).sum() == agents // 2
        assert (inner == 5).sum() == agents - agents // 2
        objects = {(y, x) for y in range(height) for x in range(width) if 1 <= inner[y, x] <= 3}
        free = {(y, x) for y in range(height) for x in range(width)} - objects
        frontier, reached = [min(free)], {min(free)}
        while frontier:
            y, x = frontier.pop()
            around = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & free - reached
            reached |= around
            frontier.extend(around)
        assert reached == free
        for y, x in objects:
            assert {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & reached


def test_start_places_and_objects_are_spread_evenly_and_facings_too():
    arena = Arena(ArenaConfig(height=6, width=6, walls=1, mines=2, altars=2, num_agents=2), 8192)
    arena.reset(1)
    cells = arena.views[:, 0].view(8192, 16, 16)[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
    seat = (cells == 4).double().mean(0)  # seat 0: 1/36 each if objects were even; they keep off the far edges a little
    assert seat.min() > 0.018
    assert seat.max() < 0.040
    objects = ((cells >= 1) & (cells <= 3)).double().mean(0)
    assert objects.min() > 0.08  # 5 of 36 is 0.139
    assert objects.max() < 0.20
    facings = torch.stack([torch.bincount(arena.facings[:, seat], minlength=5)[1:] for seat in (0, 1)])
    assert (facings - 2048).abs().max() < 5 * 39
    # and a seat's place says nothing of which team it is: both seats have the same distribution
    other = (cells == 5).double().mean(0)
    assert (seat - other).abs().max() < 5 * (2 * 0.028 / 8192) ** 0.5


def test_sixty_four_agents_play():
    arena = make_arena(3, {"num_agents": 64, "teams": "alternating"}, "cpu")
    arena.reset(1)
    history = play(arena, random_actions(130, 3, 64))
    assert history[3].sum() == 3
    assert history[1].sum() > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"hieght": 5}, "env.hieght: the arena has no such setting; did you mean env.height?"),
        ({"num_agent": 5}, "env.num_agent: the arena has no such setting; did you mean env.num_agents?"),
        ({"num_agents": 1}, "env.num_agents=1 is not possible; use a value from 2 to 64"),
        ({"num_agents": 65}, "env.num_agents=65 is not possible; use a value from 2 to 64"),
        ({"height": 3}, "env.height=3 is not possible; use a value from 4 to 64"),
        ({"ore_capacity": 1.5}, "env.ore_capacity=1.5 is not possible; use a whole number from 1 to 100"),
        ({"freeze_steps": 256}, "env.freeze_steps=256 is not possible; use a value from 1 to 255"),
        ({"walls": True}, "env.walls=True is not possible; use a whole number from 0 to 1024"),
        ({"walls": 42}, "env.mines + env.altars + env.walls=50 is not possible; a 14x14 map has room for 49"),
        ({"height": 6, "width": 6, "mines": 1, "altars": 1, "walls": 2, "num_agents": 33}, "the map has 32 free cells"),
        ({"teams": "sides"}, "env.teams=sides is not possible; use halves, alternating, or a list of 8 zeros and ones"),
        ({"teams": [0, 1]}, "use halves, alternating, or a list of 8 zeros and ones"),
        ({"teams": [0] * 8}, "use halves, alternating, or a list of 8 zeros and ones with both in it"),
        ({"teams": [0, 1, 2, 0, 1, 1, 1, 1]}, "use halves, alternating, or a list of 8 zeros and ones"),
    ],
)
def test_a_config_that_cannot_work_is_an_error_that_says_so(args, message):
    with pytest.raises(ConfigError) as error:
        parse_arena_args(args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_number_of_envs_is_checked():
    with pytest.raises(ConfigError, match=r"env.num_envs=65537 is not possible; use a value from 1 to 65536"):
        make_arena(65537, {}, "cpu")


def test_an_action_beyond_the_last_is_refused():
    arena = make_arena(1, {}, "cpu")
    arena.reset(1)
    with pytest.raises(IndexError):
        arena.step(torch.full((1, 8), 6))


def test_the_spec_says_what_the_arena_gives():
    arena = make_arena(2, {"ore_capacity": 5, "attack_cooldown": 0}, torch.device("cpu"))
    spec, space = arena.spec, arena.spec.observation_space
    assert (spec.name, spec.num_envs, spec.num_agents, spec.max_episode_steps) == ("arena", 2, 8, 128)
    assert (space.kind, space.shape, space.window, space.dtype) == ("window", (128,), (11, 11), "uint8")
    assert len(space.features) == 8
    assert len(space.own) == len(space.scales) == 5
    assert space.scales == (5.0, 8.0, 8.0, 1.0, 255.0)
    arena.reset(1)
    assert arena.step(torch.zeros(2, 8, dtype=torch.int64)).counters.shape == (2, 8, len(spec.counters))
    arena.close()
    arena.close()
