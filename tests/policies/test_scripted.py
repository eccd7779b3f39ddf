"""The scripted players: what each does on maps drawn by hand, and how strong they are against one another."""

import dataclasses

import pytest
import torch

from dual_policy_plugin.envs.arena import Arena, make_arena
from dual_policy_plugin.envs.arena_config import ACTIONS, ArenaConfig
from dual_policy_plugin.envs.arena_text import write_map
from dual_policy_plugin.errors import SpacesError
from dual_policy_plugin.policies.sampling import sample_actions
from dual_policy_plugin.policies.scripted import SCRIPTED
from dual_policy_plugin.rng import uniform

ARENA = make_arena(1, {}, "cpu").spec


def build(name):
    return SCRIPTED[name](ARENA.observation_space, ARENA.actions)


def choices(name, text, **situation):
    """Action name -> probability (above 0.1 %) that a player has for seat 0 on this map."""
    rows = text.split()
    agents = sum(character.isdigit() for character in text)
    config = ArenaConfig(num_agents=agents, height=len(rows), width=len(rows[0]), mines=1, altars=1, walls=0)
    arena = Arena(config, 1)
    arena.reset(1)
    write_map(arena, text, **situation)
    seen = torch.zeros(1, 128, dtype=torch.uint8)
    arena.observe(torch.tensor([0]), seen)
    logits, values, state = build(name).forward_step(seen, torch.zeros(1, 0))
    assert logits.shape == (1, 6)
    assert logits.dtype == values.dtype == torch.float32
    assert values.tolist() == [0]
    assert state.shape == (1, 0)
    shares = logits.softmax(1)[0].tolist()
    return {action: round(share, 3) for action, share in zip(ACTIONS, shares, strict=True) if share > 1e-3}


def test_random_takes_every_action_alike():
    assert choices("random", "0... .... .... ...1") == dict.fromkeys(ACTIONS, 0.167)


def test_a_forager_without_ore_goes_to_the_nearest_mine():
    assert choices("forager", "0.... ..... ..... M...M ....1") == {"south": 1}
    assert choices("forager", "..... .M.0. ..... M...M ....1") == {"west": 1}
    assert choices("forager", "M0... .A... ..... ..... ....1") == {"west": 1}


def test_a_forager_with_ore_goes_to_the_nearest_altar():
    assert choices("forager", "M0... .A... ..... ..... ....1", ore={0: 1}) == {"south": 1}
    assert choices("forager", "M0... ..... ..... .A... ....1", ore={0: 2}) == {"south": 1}


@pytest.mark.parametrize("facing", ["north", "south", "west", "east"])
def test_the_facing_in_the_centre_is_not_taken_for_a_thing(facing):
    # 2 is south and mine, 3 is west and altar
    text = "..... ..... 0...M ..... A...1"
    assert choices("forager", text, facing={0: facing}) == {"east": 1}
    assert choices("forager", text, facing={0: facing}, ore={0: 1}) == {"south": 1}


def test_equally_short_paths_are_equally_likely():
    assert choices("forager", "0... .... ..M. ...1") == {"south": 0.5, "east": 0.5}


@pytest.mark.parametrize("blocker", ["#", "1", "A"])
def test_a_forager_walks_around_what_is_in_its_way(blocker):
    text = "..... ....2 0{}M.. ##### ....." if blocker == "1" else "..... ....1 0{}M.. ##### ....."
    assert choices("forager", text.format(blocker)) == {"north": 1}


def test_a_walled_in_mine_is_no_goal():
    assert choices("forager", "0..#M ...## ..... ..... ....1", facing={0: "east"})["east"] > 0.9


def test_a_forager_that_sees_nothing_walks_on_and_seldom_turns_back():
    share = choices("forager", "..... ..... ..0.. ..... ....1", facing={0: "west"})
    assert share["west"] > 0.88
    assert share["north"] == share["south"] == pytest.approx(0.045, abs=0.003)
    assert share["east"] < 0.01
    # blocked ahead: it turns
    assert choices("forager", "..... ..... ##0.. ..... ....1", facing={0: "west"}) == pytest.approx(
        {"north": 0.488, "south": 0.488, "east": 0.024}, abs=0.002
    )


def test_an_enclosed_forager_waits():
    assert choices("forager", "0#... #.... ..... ..... ....1") == {"noop": 1}


def test_a_forager_never_attacks():
    assert "attack" not in choices("forager", "01... ..... ..... ..... .....", facing={0: "east"})


def test_a_hunter_hits_a_foe_ahead_when_it_can():
    text = "M01.. ..... ..... ..... ....."
    assert choices("hunter", text, facing={0: "east"}) == {"attack": 1}
    assert choices("hunter", text, facing={0: "east"}, cooldown={0: 1}) == {"west": 1}
    assert choices("hunter", text, facing={0: "east"}, frozen={1: 3}) == {"west": 1}
    assert choices("hunter", text, facing={0: "south"}) == {"east": 1}  # turns to the foe first


def test_a_hunter_goes_for_a_foe_nearby_and_leaves_a_far_one():
    assert choices("hunter", "M0... ..... .1... ..... .....") == {"south": 1}
    assert choices("hunter", "M0......1. .......... .......... ..........") == {"west": 1}
    assert choices("hunter", "M0... ..... .1... ....2 ..3..") == {"west": 1}  # seat 1 is an ally, seat 2 is too far


def test_a_segment_is_the_same_as_its_steps():
    seen = torch.randint(0, 8, (3, 40, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    state = torch.zeros(40, 0)
    for name in SCRIPTED:
        policy = build(name)
        assert not list(policy.parameters())
        logits, values = policy.forward_segment(seen, state, torch.zeros(3, 40, dtype=torch.bool))
        for step in range(3):
            expected, _, _ = policy.forward_step(seen[step], state)
            assert torch.equal(logits[step], expected)
        assert torch.equal(values, torch.zeros(3, 40))


def test_features_and_actions_are_found_by_name():
    actions = ("attack", "east", "south", "noop", "west", "north")
    policy = SCRIPTED["hunter"](ARENA.observation_space, actions)
    seen = torch.randint(0, 8, (200, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    logits, _, _ = build("hunter").forward_step(seen, torch.zeros(200, 0))
    permuted, _, _ = policy.forward_step(seen, torch.zeros(200, 0))
    assert torch.equal(permuted, logits[:, [ACTIONS.index(name) for name in actions]])


@pytest.mark.parametrize("name", ["random", "forager", "hunter"])
@pytest.mark.parametrize(
    ("change", "actions", "message"),
    [
        ({"kind": "vector", "window": (0, 0)}, ACTIONS, "observations are of kind vector"),
        ({"features": ("empty", "wall", "mine")}, ACTIONS, "no feature 'altar' but empty, wall, mine"),
        ({"own": ()}, ACTIONS, "no own-state byte 'ore' but none"),
        ({}, ("noop", "north", "south", "west", "east"), "no action 'attack' but noop, north, south, west, east"),
    ],
)
def test_another_env_is_refused(name, change, actions, message):
    space = dataclasses.replace(ARENA.observation_space, **change)
    with pytest.raises(SpacesError, match=f"a scripted policy plays the arena only; .*{message}"):
        SCRIPTED[name](space, actions)


def win_rate(first, second, *, num_envs=256, num_episodes=512):
    """Share of episodes that the first half of the seats wins (equal is half), and the counters per agent and team."""
    torch.set_num_threads(1)
    arena = make_arena(num_envs, {}, "cpu")
    arena.reset(3)
    sides = [(build(first), torch.arange(4)), (build(second), torch.arange(4, 8))]
    seen, state = torch.zeros(num_envs * 4, 128, dtype=torch.uint8), torch.zeros(num_envs * 4, 0)
    actions, rows = torch.zeros(num_envs, 8, dtype=torch.int64), torch.arange(num_envs * 4)
    wins, counters = [], []
    for step in range(num_episodes // num_envs * 128):
        for side, (policy, seats) in enumerate(sides):
            arena.observe(seats, seen)
            logits, _, _ = policy.forward_step(seen, state)
            actions[:, seats] = sample_actions(logits, uniform(8, side, step, rows)).view(num_envs, 4)
        if arena.step(actions).episode_ends.all():
            hearts = arena.result.counters[:, :, 0]
            lead = hearts[:, :4].sum(1) - hearts[:, 4:].sum(1)
            wins.append((lead > 0).double() + 0.5 * (lead == 0).double())
            counters.append(arena.result.counters.view(num_envs, 2, 4, 4).mean((0, 2)))
    return torch.cat(wins).mean().item(), torch.stack(counters).mean(0)


def test_a_forager_beats_random_and_a_hunter_beats_a_forager():
    share, counters = win_rate("forager", "random", num_episodes=256)
    assert share > 0.97
    assert counters[0, 0] > 10 * counters[1, 0]
    share, counters = win_rate("hunter", "forager", num_episodes=256)
    assert 0.75 < share < 0.95
    assert counters[0, 2] > 2  # attacks per hunter
    assert counters[1, 2] == 0
    share, _ = win_rate("hunter", "random", num_episodes=256)
    assert share > 0.97


@pytest.mark.parametrize("name", ["forager", "hunter"])
def test_mirror_matches_are_even(name):
    share, counters = win_rate(name, name)
    # 512 episodes: deviation at most 0.022, so 0.5 +- 0.066 is three of them
    assert abs(share - 0.5) < 0.066
    assert counters[0, 0] == pytest.approx(counters[1, 0].item(), rel=0.1)
    # the stock of 48 is contested: most of it is used up
    assert 35 < 4 * counters[:, 0].sum() <= 48
