"""The bytes that a rollout holds are those of the documented formula, and no tensor keeps NPC rows over time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.memory_use import tensors_of
from benchmarks.schemes import Cell, Scheme, make_ours
from dual_policy_plugin.experience import allocate_experience, experience_bytes, scratch_bytes
from dual_policy_plugin.policies.pool import TILE, Npc, NpcPool
from dual_policy_plugin.rollout.assignment import assign
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.types import EnvSpec, ObservationSpace
from tests.harness import Always

CPU = torch.device("cpu")
NUM_ENVS, HORIZON, HIDDEN = 7, 9, 16


def played(pct: float, num_npcs: int) -> Scheme:
    """A training loop after one iteration: whatever is allocated late is there."""
    scheme = make_ours(
        Cell(pct=pct, num_npcs=num_npcs, num_envs=NUM_ENVS, horizon=HORIZON, device=CPU, hidden_size=HIDDEN)
    )
    scheme.play(0)
    scheme.ppo.update(scheme.experience, 1e-3)
    return scheme


@pytest.mark.parametrize(("pct", "num_npcs"), [(0.25, 1), (0.25, 4), (0.5, 1), (0.5, 4), (1.0, 0)])
def test_held_bytes_are_those_of_the_formula(pct: float, num_npcs: int) -> None:
    scheme = played(pct, num_npcs)
    spec, num_learner, state_size = scheme.env.spec, scheme.split.num_learner, 2 * HIDDEN
    experience = experience_bytes(spec, horizon=HORIZON, num_rows=NUM_ENVS * num_learner, state_size=state_size)
    num_slots = 0
    if num_npcs > 1:
        sorted_rows, num_npc_rows = scheme.mixed.pool._rows, NUM_ENVS * scheme.split.num_npc
        num_slots = len(sorted_rows.row_of_slot)
        assert num_npc_rows <= num_slots <= num_npc_rows + num_npcs * (TILE - 1)
    scratch = scratch_bytes(
        spec, num_learner=num_learner, num_npcs=num_npcs, state_size=state_size, npc_state_size=state_size,
        num_slots=num_slots,
    )  # fmt: skip
    assert sum(tensors_of(scheme.experience).values()) == experience
    assert sum(tensors_of(scheme.experience, scheme.mixed, scheme.mixed.pool).values()) == experience + scratch


def test_the_formula_by_hand() -> None:
    """By the formula of docs/performance.md: 256 envs of 8 agents, P=.5, horizon 64, LSTM 128."""
    space = ObservationSpace(kind="window", shape=(128,), features=("empty", "wall"), window=(11, 11))
    spec = EnvSpec(
        name="arena", num_envs=256, num_agents=8, observation_space=space, actions=("noop",), max_episode_steps=128
    )
    assert experience_bytes(spec, horizon=64, num_rows=1024, state_size=256) == 1024 * (64 * 149 + 128 + 1024 + 4)
    one = scratch_bytes(spec, num_learner=4, num_npcs=1, state_size=256, npc_state_size=256)
    # learner states; NPC states and observations; actions and seats; who plays where, the probability
    assert one == 1024 * 1024 + 1024 * (1024 + 128) + 8 * 257 * 8 + 8 * 256 + 4
    four = scratch_bytes(spec, num_learner=4, num_npcs=4, state_size=256, npc_state_size=256, num_slots=1088)
    assert four - one == 16 * 1088 + 8 * 1024 + 8 * 256 + 12


@pytest.mark.parametrize(("has_truncation", "has_weights"), [(False, False), (True, False), (True, True)])
def test_other_spaces_and_optional_columns_are_in_the_formula(has_truncation: bool, has_weights: bool) -> None:
    space = ObservationSpace(kind="vector", shape=(6,), features=tuple("abcdef"))
    spec = EnvSpec(
        name="vectors", num_envs=3, num_agents=5, observation_space=space, actions=("stay", "go"),
        max_episode_steps=9, has_truncation=has_truncation, has_weights=has_weights,
    )  # fmt: skip
    experience = allocate_experience(spec, horizon=4, num_rows=6, state_size=0, device=CPU)
    per_step = 24 + 21 + 4 * has_truncation + 4 * has_weights
    assert experience_bytes(spec, horizon=4, num_rows=6, state_size=0) == 6 * (4 * per_step + 24 + 4)
    assert sum(tensors_of(experience).values()) == 6 * (4 * per_step + 24 + 4)
    pool = NpcPool([Npc(name="still", policy=Always(spec, "stay"))], num_envs=3, num_npc=3, device=CPU)
    mixed = MixedPolicy(Always(spec, "go"), pool, assign(5, 0.4), spec, CPU)
    held = sum(tensors_of(mixed, pool).values())
    assert held == scratch_bytes(spec, num_learner=2, num_npcs=1, state_size=0) == 9 * 24 + 8 * 4 * 5 + 8 * 3 + 4


class NpcRowsOverTime(TorchDispatchMode):
    """Collects what makes a tensor of `num_rows` rows at `HORIZON` (or one more) steps, and the tensor's shape."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.shapes = {(steps, num_rows) for steps in (HORIZON, HORIZON + 1)}
        self.found: list[tuple[str, tuple[int, ...]]] = []
        self.num_results = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                self.num_results += 1
                shape = tuple(leaf.shape)
                is_flat = any(steps * rows in shape for steps, rows in self.shapes)
                if is_flat or self.shapes.intersection(pairwise(shape)):
                    self.found.append((str(func), shape))
        return results


@pytest.mark.parametrize("num_npcs", [1, 4])
def test_no_tensor_holds_npc_rows_over_the_horizon(num_npcs: int) -> None:
    """In no operation of a rollout and its update; the uniform numbers, made before, are the one table of that size."""
    scheme = played(0.25, num_npcs)
    numbers = scheme.numbers(1)
    num_rows = scheme.mixed.num_npc_rows
    assert num_rows == 42 != scheme.mixed.num_learner_rows
    with NpcRowsOverTime(num_rows) as watch:
        scheme.rollout(numbers)
        scheme.ppo.update(scheme.experience, 1e-3)
    assert watch.num_results > 1000
    assert watch.found == []


def test_a_tensor_of_npc_rows_over_the_horizon_would_be_found() -> None:
    with NpcRowsOverTime(42) as watch:
        torch.zeros(10, 42, 3)
        torch.zeros(HORIZON * 42)
        torch.zeros(HORIZON, 14, 42)
    assert [shape for _, shape in watch.found] == [(10, 42, 3), (378,)]


def test_what_is_left_out_are_weights_and_scratch_of_one_block() -> None:
    """Stacked weights count as the policies'; they know nothing of envs and horizon."""
    pool = played(0.5, 4).mixed.pool
    assert pool is not None
    assert pool._stack is not None
    stacked = sum(tensors_of(*vars(pool._stack).values()).values())
    parameters = sum(parameter.numel() for npc in pool.npcs for parameter in npc.policy.parameters())
    assert 2 * parameters < stacked < 12 * 4 * parameters
