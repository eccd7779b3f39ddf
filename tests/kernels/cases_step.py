"""The policy step and the row sorting as they are launched on a device, for the arena's window and six actions."""

from __future__ import annotations

import torch

from dual_policy_plugin.kernels.group_rows import count_envs_kernel, scatter_rows_kernel
from dual_policy_plugin.kernels.policy_step import (
    TILE,
    kernel_sizes,
    launch_options,
    policy_step_kernel,
    shared_bytes,
)
from tests.kernels.ahead_of_time import Case

ROWS = {"obs": "*u8", "state": "*fp32", "uniforms": "*fp32", "seats": "*i64"}


def step_case(name: str, *, hidden: int, num_npcs: int, tile: int = TILE) -> Case:
    signature = {f"learner_{key}": dtype for key, dtype in ROWS.items()}
    signature |= {"learner_actions": "*i64", "log_probs": "*fp32", "values": "*fp32"}
    signature |= {f"npc_{key}": dtype for key, dtype in ROWS.items()}
    constexprs = {"LEARNER_SEATS": 4, "NPC_SEATS": 4, "NUM_AGENTS": 8, "HAS_GROUPS": num_npcs > 1, "TILE": tile}
    constexprs |= kernel_sizes(num_cells=121, num_codes=8, num_own=5, row_bytes=128, hidden=hidden, num_actions=6)
    if num_npcs > 1:
        signature |= {"row_of_slot": "*i32", "policy_of_tile": "*i32"}
    else:
        constexprs |= {"row_of_slot": None, "policy_of_tile": None}
    signature |= {"encoder": "*bf16", "own_scale": "*fp32", "lstm": "*bf16", "lstm_bias": "*bf16", "heads": "*bf16"}
    signature |= {"heads_bias": "*bf16", "is_greedy": "*i1", "actions": "*i64"}
    signature |= {"num_learner_rows": "i32", "num_npc_rows": "i32"}
    return Case(
        name=name,
        kernel=policy_step_kernel,
        signature=signature,
        constexprs=constexprs,
        tensor_cores=True,
        max_shared={  # held to the bound by which `supports` lets it run
            capability: min(limit, shared_bytes(hidden, torch.bfloat16, (capability // 10, 0)) * tile // TILE)
            for capability, limit in {80: 163 * 1024, 90: 227 * 1024}.items()
        },
        **launch_options(hidden, tile),
    )


CASES = [
    step_case("policy_step", hidden=128, num_npcs=16),
    step_case("policy_step_one_npc", hidden=128, num_npcs=1),
    step_case("policy_step_wide", hidden=256, num_npcs=16),
    step_case("policy_step_long_tile", hidden=128, num_npcs=16, tile=128),
    Case(
        name="count_envs",
        kernel=count_envs_kernel,
        signature={
            "npc_of_env": "*i64",
            "counts": "*i32",
            "row_of_slot": "*i32",
            "num_envs": "i32",
            "num_slots": "i32",
        },
        constexprs={"COLUMNS": 16, "BLOCK": 128, "BLOCKS_PER_PROGRAM": 1, "SLOT_BLOCKS_PER_PROGRAM": 5},
    ),
    Case(
        name="scatter_rows",
        kernel=scatter_rows_kernel,
        signature={"npc_of_env": "*i64", "counts": "*i32", "row_of_slot": "*i32", "policy_of_tile": "*i32"}
        | {"num_envs": "i32", "num_tiles": "i32", "num_programs": "i32"},
        constexprs={"COLUMNS": 16, "BLOCK": 128, "BLOCKS_PER_PROGRAM": 1, "ROWS_PER_ENV": 4}
        | {"TILE": TILE, "PROGRAMS": 128, "TILE_BLOCKS_PER_PROGRAM": 1},
    ),
]
