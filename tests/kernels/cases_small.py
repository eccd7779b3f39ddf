"""Advantages and the end of a step as they are launched for 8,192 arena envs of 8 agents."""

from __future__ import annotations

from dual_policy_plugin.kernels.end_step import BLOCK_ENVS, end_step_kernel
from dual_policy_plugin.kernels.gae import BLOCK_ROWS, gae_kernel
from tests.kernels.ahead_of_time import Case

GAE = {
    "rewards": "*fp32", "values": "*fp32", "dones": "*i1", "final_values": "*fp32", "last_values": "*fp32",
    "advantages": "*fp32", "num_rows": "i32:16", "gamma": "fp32", "decay": "fp32",
}  # fmt: skip
END_STEP = {
    "rewards": "*fp32", "dones": "*i1", "episode_ends": "*i1", "scores": "*fp32", "counters": "*fp32",
    "learner_seats": "*i64", "npc_seats": "*i64", "rewards_out": "*fp32", "dones_out": "*i1",
    "returns": "*fp64", "is_counting": "*i1", "sums": "*fp64", "learner_state": "*fp32", "npc_state": "*fp32",
    "npc_of_env": "*i64", "probabilities": "*fp32", "uniforms": "*fp32", "num_envs": "i32:16",
}  # fmt: skip


def gae_case(name: str, **absent: None) -> Case:
    """The arena has no truncation, so no final values; foreign envs have."""
    return Case(
        name=name,
        kernel=gae_kernel,
        signature={argument: dtype for argument, dtype in GAE.items() if argument not in absent},
        constexprs={"HORIZON": 64, "BLOCK_ROWS": BLOCK_ROWS} | absent,
    )


def end_step_case(name: str, *, num_learner: int, num_npc: int, num_npcs: int, **absent: None) -> Case:
    """A launch of `end_step` for a fast agent with 128 hidden units (states of 256) and the arena's four counters."""
    return Case(
        name=name,
        kernel=end_step_kernel,
        signature={argument: dtype for argument, dtype in END_STEP.items() if argument not in absent},
        constexprs={
            "NUM_LEARNER": num_learner,
            "NUM_NPC": num_npc,
            "NUM_NPCS": num_npcs,
            "NUM_COUNTERS": 0 if "counters" in absent else 4,
            "LEARNER_STATE": 256,
            "NPC_STATE": 256 if num_npc else 0,
            "COUNT_LATER": True,
            "BLOCK_ENVS": BLOCK_ENVS,
            "BLOCK_LEARNER": 1 << (num_learner - 1).bit_length(),
            "BLOCK_NPC": 1 << max(num_npc - 1, 0).bit_length(),
            "BLOCK_STATE": 64,
        }
        | absent,
    )


NO_POOL = {"npc_of_env": None, "probabilities": None, "uniforms": None}

CASES = [
    gae_case("gae", final_values=None),
    gae_case("gae with truncations"),
    end_step_case("end_step", num_learner=4, num_npc=4, num_npcs=1, scores=None),
    end_step_case("end_step of a pool", num_learner=2, num_npc=6, num_npcs=16, scores=None),
    end_step_case("end_step without NPC", num_learner=8, num_npc=0, num_npcs=1, scores=None, npc_state=None, **NO_POOL),
    end_step_case("end_step of 64 agents with scores", num_learner=32, num_npc=32, num_npcs=4, counters=None),
]
