"""The arena's kernels as they are launched on a GPU: the default arena, and the largest one."""

from __future__ import annotations

from typing import Any

from dual_policy_plugin.envs.arena_config import ArenaConfig
from dual_policy_plugin.kernels.arena import OBSERVE_ROWS, observe_kernel, step_sizes, step_warps
from dual_policy_plugin.kernels.arena_step import step_kernel
from tests.kernels.ahead_of_time import Case

STEP = {
    "actions": "*i64", "views": "*u8", "amounts": "*u8", "positions": "*i64", "view_cells": "*i64", "facings": "*i64",
    "carried": "*u8", "totals": "*fp32", "steps_left": "*i32", "episodes": "*i32", "env_keys": "*i32",
    "priority_keys": "*i32", "seat_keys": "*i32", "teams": "*i64", "rewards": "*fp32", "dones": "*i1",
    "episode_ends": "*i1", "final_totals": "*fp32",
}  # fmt: skip
OBSERVE = {
    "views": "*u8", "positions": "*i64", "facings": "*i64", "carried": "*u8", "teams": "*i64", "seats": "*i64",
    "out": "*u8", "more_seats": "*i64", "more_out": "*u8", "num_envs": "i32",
}  # fmt: skip
LARGEST = ArenaConfig(num_agents=64, height=64, width=64, mines=256, altars=256, walls=512)


def step_case(name: str, config: ArenaConfig) -> Case:
    sizes: dict[str, Any] = step_sizes(config)
    return Case(name=name, kernel=step_kernel, signature=STEP, constexprs=sizes, num_warps=step_warps(sizes))


def observe_case(name: str, config: ArenaConfig, num_seats: int, num_more: int) -> Case:
    sizes = {"NUM_AGENTS": config.num_agents, "HEIGHT": config.height, "WIDTH": config.width, "ROWS": OBSERVE_ROWS}
    groups = {"NUM_SEATS": num_seats, "NUM_MORE": num_more}
    return Case(name=name, kernel=observe_kernel, signature=OBSERVE, constexprs=sizes | groups)


CASES = [
    step_case("arena step", ArenaConfig()),
    step_case("arena step, largest", LARGEST),
    observe_case("arena observe", ArenaConfig(), 4, 4),
    observe_case("arena observe, one group", ArenaConfig(), 8, 0),
    observe_case("arena observe, largest", LARGEST, 16, 48),
]
