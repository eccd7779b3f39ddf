"""The arena's kernels beside their torch twin: every tensor of the state, every result, every observation, bit for bit.

The games are played so that all rules come to bear, and the tests say so: a rule that never fired was not compared.
"""
# ruff: noqa: N803 -- constants of a kernel are written in capitals

from __future__ import annotations

from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dual_policy_plugin import rng
from dual_policy_plugin.envs import arena as arena_module
from dual_policy_plugin.envs import arena_config, arena_maps
from dual_policy_plugin.envs.arena import STATE_NAMES, Arena, ArenaConfig
from dual_policy_plugin.kernels import arena as arena_kernels
from dual_policy_plugin.kernels import arena_maps as map_kernels
from dual_policy_plugin.kernels import arena_step as step_kernels
from dual_policy_plugin.kernels import hashing
from dual_policy_plugin.kernels.arena import observe_arena

BUSY = {"height": 5, "width": 6, "mines": 1, "altars": 3, "walls": 1, "altar_stock": 1, "ore_capacity": 2}
BUSY |= {"freeze_steps": 2, "attack_cooldown": 3}
HEARTS = 0
TIMES_FROZEN = 3
EMPTY, MINE, ALTAR, FOE = 0, 2, 3, 5


def codes_ahead(arena: Arena, facings: Tensor) -> tuple[Tensor, Tensor]:
    """(E, A) the cell ahead of each seat that faces so, and what its team sees there."""
    ahead = arena.positions + arena.offsets[facings]
    return ahead, arena.views.view(-1)[ahead + arena.to_views[0]]


def start_busily(arena: Arena, seed: int) -> None:
    """Starts a game in which all carry ore, half of them no more of it, and have hearts to fill an observed byte."""
    arena.reset(seed, stagger=True)
    arena.totals[HEARTS] = 255
    arena.ore.copy_(1 + torch.arange(arena.config.num_agents) % 2)
    arena.place_agents()


def busy_actions(arena: Arena, generator: torch.Generator) -> Tensor:
    """(E, A) int64: seats use what stands before them, mostly, and wander otherwise."""
    _, code = codes_ahead(arena, arena.facings)
    anything = torch.randint(0, 6, arena.positions.shape, generator=generator)
    useful = (code == MINE) | (code == ALTAR)
    actions = torch.where(useful & (anything > 1), arena.facings, anything)
    return torch.where((code == FOE) & (anything > 0), 5, actions)


def step_twin(twin: Arena, actions: Tensor, happened: Counter[str]) -> None:
    """Steps the twin and counts what was tried and what came of it, where the episode went on."""
    awake = ~twin.frozen.bool()
    moves = (actions >= 1) & (actions <= 4) & awake
    ahead, code = codes_ahead(twin, torch.where(moves, actions, twin.facings))
    goes, offers = moves & (code == EMPTY), moves & (code == ALTAR) & twin.ore.bool()
    attacks = (actions == 5) & (code == FOE) & awake
    hits = attacks & ~twin.cooldown.bool()
    happened["full at a mine"] += int((moves & (code == MINE) & (twin.ore == twin.config.ore_capacity)).sum())
    loot = twin.amounts.view(-1)[ahead]
    robs = hits & (loot > 0)
    happened["robberies"] += int(robs.sum())
    happened["loot beyond capacity"] += int((robs & (loot + twin.ore > twin.config.ore_capacity)).sum())
    happened["hits too early"] += int((attacks & ~hits).sum())
    for name, claims in (
        ("contested cells", goes),
        ("contested altars", offers),
        ("contested loot", robs & (twin.ore < twin.config.ore_capacity)),
    ):
        happened[name] += int(claims.sum()) - len(ahead[claims].unique())

    num_altars, totals = (twin.views[:, 0] == ALTAR).sum(1), twin.totals.clone()
    going_on = ~twin.step(actions).episode_ends
    gains = (twin.totals - totals)[:, going_on]
    happened.update(dict(zip(("hearts", "ore", "attacks", "freezes"), gains.sum((1, 2)).int().tolist(), strict=True)))
    happened["hit on the way"] += int((gains[TIMES_FROZEN] * goes[going_on]).sum())
    happened["hit at an altar"] += int((gains[TIMES_FROZEN] * offers[going_on]).sum())
    happened["spent altars"] += int((num_altars - (twin.views[:, 0] == ALTAR).sum(1))[going_on].sum())
    happened["hearts beyond a byte"] += int((twin.totals[HEARTS] > 255).sum())
    happened["ends"] += int((~going_on).sum())


def assert_same(kernel: Arena, twin: Arena) -> None:
    for name in (*STATE_NAMES, "view_cells"):
        assert torch.equal(getattr(kernel, name), getattr(twin, name)), name
    for name in ("rewards", "dones", "episode_ends"):
        assert torch.equal(getattr(kernel.result, name), getattr(twin.result, name)), name
    ends = twin.result.episode_ends
    assert torch.equal(kernel.final_totals[ends], twin.final_totals[ends])


def observe_both(kernel: Arena, twin: Arena, seats: list[int], others: list[int]) -> None:
    """Compares the observations of two groups of seats, written by one launch, with the twin's."""
    num_envs = len(twin.positions)
    groups = [torch.tensor(seats), torch.tensor(others)]
    outs = [torch.full((num_envs * len(group), 128), 77, dtype=torch.uint8) for group in groups * 2]
    observe_arena(kernel, groups[0], outs[0], groups[1], outs[1])
    for group, out in zip(groups, outs[2:], strict=True):
        twin.observe(group, out)
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])


def tensors_of(arena: Arena) -> dict[str, Tensor]:
    """All that a captured graph may hold."""
    results = {
        f"result.{name}": getattr(arena.result, name) for name in ("rewards", "dones", "episode_ends", "counters")
    }
    return results | {name: value for name, value in vars(arena).items() if isinstance(value, Tensor)}


def assert_nothing_is_rebound(arena: Arena, tensors: dict[str, Tensor]) -> None:
    now = tensors_of(arena)
    assert [name for name in tensors if now[name] is not tensors[name]] == []


def play_both(config: ArenaConfig, num_envs: int, num_steps: int, *, seed: int = 5) -> tuple[Arena, Counter[str]]:
    """Plays one game on both, compares after every step; gives the kernels' arena and how often what happened."""
    twin, kernel = (Arena(config, num_envs, env_numbers=range(3, 3 + num_envs)) for _ in range(2))
    kernel.use_kernels = True
    for arena in (twin, kernel):
        start_busily(arena, seed)
    tensors = tensors_of(kernel)
    generator = torch.Generator().manual_seed(seed)
    happened: Counter[str] = Counter()
    middle = config.num_agents // 2
    for step in range(num_steps):
        actions = busy_actions(twin, generator)
        step_twin(twin, actions, happened)
        assert kernel.step(actions.clone()) is kernel.result
        assert_same(kernel, twin)
        if step % 3 == 0:
            seats = [*range(config.num_agents)][:: 1 - step % 2 * 2]
            observe_both(kernel, twin, seats[:middle], seats[middle:])
    assert_nothing_is_rebound(kernel, tensors)
    assert (kernel.claims == -1).all()
    return kernel, happened


def test_both_play_one_game_in_which_all_rules_fire() -> None:
    _, happened = play_both(ArenaConfig(**BUSY, num_agents=8, episode_steps=8), 4, 20, seed=4)
    rare = (
        "hearts", "ore", "attacks", "freezes", "full at a mine", "robberies", "loot beyond capacity", "hits too early",
        "contested cells", "contested altars", "contested loot", "hit on the way", "hit at an altar",
        "spent altars", "hearts beyond a byte", "ends",
    )  # fmt: skip
    assert min(happened[name] for name in rare) > 0, happened


@pytest.mark.parametrize(
    ("changes", "num_envs", "seed"),
    [
        ({"num_agents": 2, "height": 4, "width": 5, "altars": 1, "walls": 0}, 3, 46),
        ({"num_agents": 5, "teams": "alternating", "attack_cooldown": 0, "altar_stock": 2}, 3, 50),
        ({"num_agents": 3, "teams": [1, 0, 1], "height": 7, "width": 4, "freeze_steps": 255}, 3, 28),
    ],
    ids=["2 agents", "alternating teams, no cooldown", "teams by a list"],
)
def test_other_sizes_and_teams_agree_over_short_episodes(changes: dict[str, object], num_envs: int, seed: int) -> None:
    config = ArenaConfig(**(BUSY | {"episode_steps": 5} | changes))
    _, happened = play_both(config, num_envs, 12, seed=seed)
    assert happened["ends"] >= 2 * num_envs
    assert min(happened["freezes"], happened["hearts"], happened["ore"]) > 0, happened


@pytest.mark.parametrize(
    "config",
    [
        ArenaConfig(episode_steps=2),
        ArenaConfig(num_agents=64, height=64, width=64, mines=256, altars=256, walls=512, episode_steps=2),
    ],
    ids=["default", "largest"],
)
def test_full_sized_maps_agree(config: ArenaConfig) -> None:
    _, happened = play_both(config, 2, 3)
    assert happened["ends"] == 3


def test_a_reset_and_a_loaded_state_go_on_with_the_kernels() -> None:
    config = ArenaConfig(**BUSY, num_agents=4, episode_steps=5)
    kernel, _ = play_both(config, 2, 4)
    twin = Arena(config, 2, env_numbers=[3, 4])
    twin.load_state_dict(kernel.state_dict())
    tensors = tensors_of(kernel)
    generator = torch.Generator().manual_seed(0)
    old = twin.state_dict()
    for begin in ("at the loaded state", "anew", "at the old state"):
        for arena in (twin, kernel):
            if begin == "anew":
                arena.reset(8)
            elif begin == "at the old state":
                arena.load_state_dict(old)
        for _ in range(3):
            actions = busy_actions(twin, generator)
            twin.step(actions)
            kernel.step(actions)
            assert_same(kernel, twin)
    assert_nothing_is_rebound(kernel, tensors)


def test_only_an_ended_episode_writes_its_totals() -> None:
    kernel = Arena(ArenaConfig(**BUSY, num_agents=2, episode_steps=4), 2)
    kernel.use_kernels = True
    kernel.reset(1)
    kernel.steps_left[1] = 1
    kernel.totals.fill_(3)
    kernel.final_totals.fill_(-7)
    kernel.step(torch.zeros(2, 2, dtype=torch.int64))
    assert kernel.result.episode_ends.tolist() == [False, True]
    assert kernel.result.dones.tolist() == [[False, False], [True, True]]
    assert (kernel.final_totals[0] == -7).all()
    assert (kernel.final_totals[1] == 3).all()
    assert kernel.steps_left.tolist() == [3, 4]


def test_the_envs_observe_is_the_kernels_with_one_group() -> None:
    config = ArenaConfig(**BUSY, num_agents=5, teams="alternating")
    twin, kernel = Arena(config, 7), Arena(config, 7)  # 7 * 3 rows: the last program has some too many
    kernel.use_kernels = True
    outs = []
    for arena in (twin, kernel):
        arena.reset(4)
        arena.carried.copy_(torch.arange(5 * 7 * 5).view(5, 7, 5))
        buffer = torch.full((7 * 3 + 2, 128), 99, dtype=torch.uint8)
        arena.observe(torch.tensor([4, 0, 3]), buffer[1:-1])
        outs.append(buffer)
    assert torch.equal(*outs)
    assert (outs[1][0] == 99).all()
    assert (outs[1][-1] == 99).all()


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_the_twin_keeps_its_tensors_for_a_captured_graph(fixed_shapes: bool) -> None:
    twin = Arena(ArenaConfig(**BUSY, num_agents=4, episode_steps=5), 6)
    twin._fixed_shapes = fixed_shapes
    twin.reset(1, stagger=True)
    tensors = tensors_of(twin)
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        twin.step(busy_actions(twin, generator))
    twin.load_state_dict(twin.state_dict())
    twin.reset(2, stagger=True)
    twin.step(busy_actions(twin, generator))
    assert_nothing_is_rebound(twin, tensors)


@triton.jit
def hash_kernel(states, keys, extended, distinct, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    state, key = tl.load(states + lane), tl.load(keys + lane)
    tl.store(extended + lane, hashing.extend(hashing.extend(state, key), 7).to(tl.int32))
    tl.store(distinct + lane, hashing.distinct_keys(state, key))


@pytest.mark.filterwarnings("error")
def test_hashes_are_those_of_rng() -> None:
    generator = torch.Generator().manual_seed(3)
    states, keys = torch.randint(-(2**31), 2**31, (2, 1024), generator=generator).to(torch.int32)
    edges = torch.tensor([0, -1, 1, 2**31 - 1, -(2**31), 0x7FFF, 0x10000, -0x10000], dtype=torch.int32)
    states[:64], keys[:64] = edges.repeat(8), edges.repeat_interleave(8)
    extended, distinct = torch.empty_like(states), torch.empty_like(states)
    hash_kernel[(1,)](states, keys, extended, distinct, SIZE=1024)
    assert torch.equal(extended, rng.extend(states, keys, 7))
    assert torch.equal(distinct, rng.distinct_keys(states, keys))


def test_kernels_and_rule_book_mean_the_same_by_a_number() -> None:
    names = ("empty", "wall", "mine", "altar", "ally", "foe", "frozen_ally", "frozen_foe")
    assert names == arena_config.FEATURES
    for name in ("EMPTY", "WALL", "MINE", "ALTAR", "MARGIN"):
        assert getattr(map_kernels, name).value == getattr(arena_maps, name)
    for name in ("ALLY", "FOE", "FROZEN_ALLY"):
        assert getattr(step_kernels, name).value == getattr(arena_module, name)
    assert arena_module.FROZEN_FOE == arena_module.FROZEN_ALLY + 1
    assert arena_config.ACTIONS == ("noop", "north", "south", "west", "east", "attack")
    assert step_kernels.ATTACK.value == 5
    assert arena_config.OWN == ("ore", "hearts", "frozen", "cooldown", "time_left")
    assert arena_config.COUNTERS == ("hearts", "ore", "attacks", "times_frozen")
    assert arena_kernels.WINDOW.value == arena_config.WINDOW
    assert arena_kernels.ROW_BYTES.value == arena_config.ROW_BYTES
    assert arena_kernels.NUM_OWN.value == len(arena_config.OWN)
