"""Every rule of the arena's rule book, on maps drawn by hand."""

import pytest
import torch

from dual_policy_plugin.envs.arena import Arena
from dual_policy_plugin.envs.arena_config import ACTIONS, ArenaConfig
from dual_policy_plugin.envs.arena_text import show_map, write_map

NUMBER = {name: number for number, name in enumerate(ACTIONS)}


def draw(text, *, seed=1, situation=None, **settings):
    """An arena of one env with this map; the second half of its seats are foes of the first."""
    rows = text.split()
    agents = sum(character.isdigit() for character in text)
    sizes = {"num_agents": agents, "height": len(rows), "width": len(rows[0]), "mines": 1, "altars": 1, "walls": 0}
    arena = Arena(ArenaConfig(**(sizes | settings)), 1)
    arena.reset(seed)
    write_map(arena, text, **(situation or {}))
    return arena


def act(arena, *names):
    """One step; returns (rewards, counters so far) as lists, one entry per seat."""
    result = arena.step(torch.tensor([[NUMBER[name] for name in names]]))
    return result.rewards[0].tolist()


def counted(arena, name):
    index = arena.spec.counters.index(name)
    return arena.totals[index, 0].tolist()


@pytest.mark.parametrize(
    ("move", "after"),
    [
        ("noop", ".... .0.. .... ...1"),
        ("north", ".0.. .... .... ...1"),
        ("south", ".... .... .0.. ...1"),
        ("west", ".... 0... .... ...1"),
        ("east", ".... ..0. .... ...1"),
    ],
)
def test_a_move_onto_a_free_cell_goes_there_and_turns(move, after):
    arena = draw(".... .0.. .... ...1", situation={"facing": {0: "west"}})
    assert act(arena, move, "noop") == [0, 0]
    assert show_map(arena).split() == after.split()
    assert arena.facings[0, 0] == (NUMBER[move] if move != "noop" else NUMBER["west"])


@pytest.mark.parametrize("text", ["..0. .... .... ...1", "..#. ..0. .... ...1", "..1. ..0. .... ...."])
def test_a_blocked_move_turns_and_stays(text):
    arena = draw(text, situation={"facing": {0: "south"}})
    act(arena, "north", "noop")
    assert show_map(arena).split() == text.split()
    assert arena.facings[0, 0] == NUMBER["north"]


def test_a_cell_left_in_this_step_is_not_free_in_it():
    arena = draw("01.. .... .... ....")
    act(arena, "east", "east")
    assert show_map(arena).split() == ["0.1.", "....", "....", "...."]
    act(arena, "east", "west")  # both want the cell between them: one of them gets it
    assert show_map(arena).split()[0] in (".01.", "01..")


def test_two_agents_do_not_swap():
    arena = draw("01.. .... .... ....")
    act(arena, "east", "west")
    assert show_map(arena).split()[0] == "01.."


def test_one_of_those_who_want_a_cell_gets_it_and_each_as_often():
    wins = [0, 0, 0, 0]
    for seed in range(400):
        arena = draw(".0.. 1.2. .3.. ....", seed=seed)
        act(arena, "south", "east", "west", "north")
        wins[int(show_map(arena).split()[1][1])] += 1
    # 100 +- 8.7 each
    assert min(wins) > 65
    assert max(wins) < 135


def test_a_mine_gives_ore_up_to_the_capacity_and_never_runs_out():
    arena = draw(".M.. .0.. .M.. ...1", ore_capacity=3)
    carried = []
    for _ in range(5):
        assert act(arena, "north", "noop") == [0, 0]
        carried.append(arena.ore[0, 0].item())
    assert carried == [1, 2, 3, 3, 3]
    assert counted(arena, "ore") == [3, 0]
    assert show_map(arena).split() == [".M..", ".0..", ".M..", "...1"]


def test_many_take_ore_from_one_mine_in_one_step():
    arena = draw(".0.. 1M2. .3.. ....")
    act(arena, "south", "east", "west", "north")
    assert arena.ore[0].tolist() == [1, 1, 1, 1]


def test_an_altar_turns_one_ore_into_one_heart_and_a_reward():
    arena = draw(".A.. .0.. .... ...1", situation={"ore": {0: 2}}, altar_stock=6)
    assert act(arena, "north", "noop") == [1, 0]
    assert (arena.ore[0, 0], arena.hearts[0, 0]) == (1, 1)
    assert act(arena, "north", "noop") == [1, 0]
    assert act(arena, "north", "noop") == [0, 0]  # no ore left
    assert (arena.ore[0, 0], arena.hearts[0, 0]) == (0, 2)
    assert counted(arena, "hearts") == [2, 0]
    assert show_map(arena).split()[0] == ".A.."


def test_an_altar_without_stock_is_a_wall_for_both_teams():
    arena = draw(".A1. .0.. .... ....", situation={"ore": {0: 2, 1: 2}, "stock": 2})
    assert act(arena, "north", "noop") == [1, 0]
    assert show_map(arena).split()[0] == ".A1."
    assert act(arena, "noop", "west") == [0, 1]
    assert show_map(arena).split()[0] == ".#1."
    assert act(arena, "north", "west") == [0, 0]
    assert arena.ore[0].tolist() == [1, 1]
    seen = torch.zeros(2, 128, dtype=torch.uint8)
    arena.observe(torch.arange(2), seen)
    assert seen[0, 60 - 11] == 1  # the cell north of the first
    assert seen[1, 60 - 1] == 1  # and west of the second


@pytest.mark.parametrize("stock", [1, 6])
def test_an_altar_serves_one_agent_a_step_and_each_as_often(stock):
    served = [0, 0, 0, 0]
    for seed in range(200):
        situation = {"ore": {0: 1, 1: 1, 2: 1, 3: 1}, "stock": stock}
        arena = draw(".0.. 1A2. .3.. ....", seed=seed, situation=situation)
        rewards = act(arena, "south", "east", "west", "north")
        assert sum(rewards) == 1
        assert arena.ore[0].tolist() == [1 - reward for reward in rewards]
        served[rewards.index(1)] += 1
        assert show_map(arena).split()[1][1] == ("#" if stock == 1 else "A")
    # 50 +- 6.1 each
    assert min(served) > 25
    assert max(served) < 75


def test_one_without_ore_does_not_keep_another_from_the_altar():
    for seed in range(20):
        arena = draw(".0.. 1A2. .3.. ....", seed=seed, situation={"ore": {2: 1}})
        assert act(arena, "south", "east", "west", "north") == [0, 0, 1, 0]


def test_a_hit_freezes_the_foe_takes_its_ore_and_starts_the_cooldown():
    situation = {"facing": {0: "east"}, "ore": {0: 1, 1: 1}}
    arena = draw(".01. .... .... ....", situation=situation, freeze_steps=2, attack_cooldown=4)
    assert act(arena, "attack", "noop") == [0, 0]
    assert arena.ore[0].tolist() == [2, 0]
    assert arena.frozen[0].tolist() == [0, 2]
    assert arena.cooldown[0].tolist() == [4, 0]
    assert counted(arena, "attacks") == [1, 0]
    assert counted(arena, "times_frozen") == [0, 1]
    for frozen, cooldown in ((1, 3), (0, 2)):
        act(arena, "noop", "south")  # a frozen agent does nothing
        assert (arena.frozen[0, 1], arena.cooldown[0, 0]) == (frozen, cooldown)
        assert show_map(arena).split() == [".01.", "....", "....", "...."]
    act(arena, "noop", "south")  # freeze_steps are over
    assert show_map(arena).split() == [".0..", "..1.", "....", "...."]


def test_the_cooldown_lasts_attack_cooldown_steps():
    situation = {"facing": {0: "east"}}
    arena = draw(".01. .... .... ....", situation=situation, freeze_steps=1, attack_cooldown=3)
    hits = []
    for _ in range(9):
        act(arena, "attack", "noop")
        hits.append(counted(arena, "attacks")[0])
    assert hits == [1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_a_robber_takes_ore_up_to_its_capacity_and_the_rest_is_lost():
    situation = {"facing": {0: "east"}, "ore": {0: 2, 1: 3}}
    arena = draw(".01. .... .... ....", situation=situation, ore_capacity=3)
    act(arena, "attack", "noop")
    assert arena.ore[0].tolist() == [3, 0]
    assert counted(arena, "ore") == [0, 0]  # stolen ore was not mined


@pytest.mark.parametrize(
    ("text", "facing"),
    [("0.1. .... .... ....", "east"), (".1.. .0.. .... ....", "west"), ("#0.. .... .... ...1", "west")],
)
def test_an_attack_on_nothing_does_nothing_and_costs_no_cooldown(text, facing):
    arena = draw(text, situation={"facing": {0: facing}, "ore": {1: 2}})
    act(arena, "attack", "noop")
    assert arena.cooldown[0].tolist() == [0, 0]
    assert arena.ore[0].tolist() == [0, 2]
    assert counted(arena, "attacks") == [0, 0]
    assert show_map(arena).split() == text.split()


def test_an_ally_and_a_frozen_foe_cannot_be_attacked():
    situation = {"facing": {0: "east", 1: "east"}, "ore": {1: 1, 2: 1}, "frozen": {2: 3}}
    arena = draw("012. .... .... 3...", situation=situation)
    act(arena, "attack", "attack", "noop", "noop")
    assert arena.frozen[0].tolist() == [0, 0, 2, 0]
    assert arena.ore[0].tolist() == [0, 1, 1, 0]
    assert arena.cooldown[0].tolist() == [0, 0, 0, 0]


def test_an_agent_in_cooldown_cannot_attack():
    arena = draw(".01. .... .... ....", situation={"facing": {0: "east"}, "cooldown": {0: 1}})
    act(arena, "attack", "noop")
    assert arena.frozen[0].tolist() == [0, 0]
    act(arena, "attack", "noop")
    assert arena.frozen[0].tolist() == [0, 8]


def test_two_may_freeze_each_other_and_swap_their_ore():
    situation = {"facing": {0: "east", 1: "west"}, "ore": {0: 1, 1: 3}}
    arena = draw(".01. .... .... ....", situation=situation)
    act(arena, "attack", "attack")
    assert arena.frozen[0].tolist() == [8, 8]
    assert arena.ore[0].tolist() == [3, 1]
    assert counted(arena, "times_frozen") == [1, 1]


def test_one_of_many_attackers_has_the_ore_and_all_pay_the_cooldown():
    robbers = set()
    for seed in range(40):
        situation = {"facing": {0: "east", 1: "west"}, "ore": {2: 3}}
        arena = draw(".021 .... .... ...3", seed=seed, situation=situation)
        act(arena, "attack", "attack", "noop", "noop")
        assert sorted(arena.ore[0].tolist()) == [0, 0, 0, 3]
        assert arena.cooldown[0].tolist() == [12, 12, 0, 0]
        assert arena.frozen[0].tolist() == [0, 0, 8, 0]
        assert counted(arena, "attacks") == [1, 1, 0, 0]
        assert counted(arena, "times_frozen") == [0, 0, 1, 0]
        robbers.add(arena.ore[0].argmax().item())
    assert robbers == {0, 1}


@pytest.mark.parametrize("action", ["south", "east", "west"])
def test_one_who_is_hit_neither_moves_nor_mines_nor_uses_the_altar(action):
    # 1 stands between a mine (west) and an altar (east), with a free cell south of it
    situation = {"facing": {0: "south"}, "ore": {1: 2}}
    arena = draw("..0. .M1A .... ....", situation=situation)
    assert act(arena, "attack", action) == [0, 0]
    assert show_map(arena).split() == ["..0.", ".M1A", "....", "...."]
    assert arena.ore[0].tolist() == [2, 0]
    assert counted(arena, "ore") == [0, 0]
    assert arena.amounts.max() <= 12
    assert arena.facings[0, 1] == NUMBER[action]


def test_what_one_who_is_hit_had_claimed_goes_to_nobody():
    moved = 0
    for seed in range(40):
        # 0 hits 2; 2 and 1 want the same cell
        arena = draw("0... 2.1. .... ...3", seed=seed, situation={"facing": {0: "south"}})
        act(arena, "attack", "west", "east", "noop")
        row = show_map(arena).split()[1]
        assert row in ("2.1.", "21..")
        moved += row == "21.."
    # 1 has the higher priority in half of the cases: 20 +- 3.2
    assert 6 < moved < 34


def test_a_frozen_agent_does_not_turn_mine_attack_or_offer():
    for action in ("north", "west", "attack"):
        situation = {"facing": {0: "east"}, "ore": {0: 1}, "frozen": {0: 2}}
        arena = draw(".A.. M01. .... ....", situation=situation)
        assert act(arena, action, "noop") == [0, 0]
        assert arena.ore[0].tolist() == [1, 0]
        assert arena.frozen[0].tolist() == [1, 0]
        assert arena.facings[0, 0] == NUMBER["east"]


def test_the_time_limit_ends_the_episode_for_all_and_the_next_one_begins():
    arena = draw(".A.. .0.. .... ...1", situation={"ore": {0: 3}}, episode_steps=3)
    assert not arena.spec.has_truncation
    times, seen = [], torch.zeros(2, 128, dtype=torch.uint8)
    for step in range(3):
        arena.observe(torch.arange(2), seen)
        times.append(seen[0, 125].item())
        result = arena.step(torch.tensor([[NUMBER["north"], NUMBER["noop"]]]))
        assert result.dones.tolist() == [[step == 2] * 2]
        assert result.episode_ends.tolist() == [step == 2]
    assert times == [255, 170, 85]
    assert result.truncated is None
    # the last step's reward belongs to the episode that ended, and its totals are complete
    assert result.rewards.tolist() == [[1, 0]]
    assert result.counters[0].tolist() == [[3, 0, 0, 0], [0, 0, 0, 0]]
    # what is seen now is the first of the next episode
    arena.observe(torch.arange(2), seen)
    assert seen[:, 121:126].tolist() == [[0, 0, 0, 0, 255]] * 2
    assert show_map(arena).count("M") == 1
    assert show_map(arena).count("A") == 1
    assert arena.episodes.tolist() == [1]
    result = arena.step(torch.zeros(1, 2, dtype=torch.int64))
    assert not result.dones.any()
    assert result.rewards.tolist() == [[0, 0]]


def test_the_own_bytes_are_ore_hearts_frozen_cooldown_and_time():
    situation = {"ore": {0: 2}, "frozen": {1: 5}, "cooldown": {0: 7}}
    arena = draw(".A.. .0.. .... ...1", situation=situation, episode_steps=10)
    seen = torch.full((2, 128), 9, dtype=torch.uint8)
    arena.observe(torch.tensor([1, 0]), seen)
    assert seen[:, 121:].tolist() == [[0, 0, 5, 0, 255, 0, 0], [2, 0, 0, 7, 255, 0, 0]]
    act(arena, "north", "noop")
    arena.observe(torch.tensor([1, 0]), seen)
    # nine of ten steps are left: 229.5, rounded up
    assert seen[:, 121:].tolist() == [[0, 0, 4, 0, 230, 0, 0], [1, 1, 0, 6, 230, 0, 0]]


def test_what_an_agent_sees_has_all_eight_codes():
    text = ".#.. M0A. .12. .3.."
    situation = {"facing": {0: "west"}, "frozen": {1: 2, 3: 1}}
    arena = draw(text, situation=situation)
    seen = torch.zeros(4, 128, dtype=torch.uint8)
    arena.observe(torch.arange(4), seen)
    window = seen[0, :121].view(11, 11)
    assert window[5, 5] == 3  # the agent itself: facing west
    # rows 4 to 7 and columns 4 to 7 are the inner map; 1 wall, 2 mine, 3 altar, 5 foe, 6 frozen ally, 7 frozen foe
    assert window[4:8, 4:8].tolist() == [[0, 1, 0, 0], [2, 3, 3, 0], [0, 6, 5, 0], [0, 7, 0, 0]]
    outside = window.clone()
    outside[4:8, 4:8] = 1
    assert (outside == 1).all()
    # seat 2 is of the other team and stands one south and one east
    window = seen[2, :121].view(11, 11)
    assert window[3:7, 3:7].tolist() == [[0, 1, 0, 0], [2, 5, 3, 0], [0, 7, 1, 0], [0, 6, 0, 0]]


def test_a_map_by_hand_must_fit():
    arena = draw("01.. .... .... ....")
    with pytest.raises(ValueError, match="4 rows of 4"):
        write_map(arena, "01.. .... ....")
    with pytest.raises(ValueError, match=r"seats \[0\]"):
        write_map(arena, "0...\n....\n....\n....")
