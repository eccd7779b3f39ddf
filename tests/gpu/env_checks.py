"""The kernels that multiply no matrices (env, ends of episodes, advantages) beside their plain twins on the CPU.

As in `kernel_checks.py`, device and sizes are arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dual_policy_plugin.envs.arena import FOE, STATE_NAMES, Arena
from dual_policy_plugin.envs.arena_config import ACTIONS, ROW_BYTES, ArenaConfig
from dual_policy_plugin.envs.arena_maps import ALTAR, MINE
from dual_policy_plugin.kernels.end_step import end_step
from dual_policy_plugin.learning.advantage import compute_gae
from dual_policy_plugin.policies.pool import Npc, NpcPool
from dual_policy_plugin.rollout.assignment import assign
from dual_policy_plugin.rollout.episode_metrics import EpisodeMetrics
from dual_policy_plugin.rollout.mixed_policy import MixedPolicy
from dual_policy_plugin.types import EnvSpec, ObservationSpace, StepResult
from tests.gpu.agreement import assert_same

CPU = torch.device("cpu")


def check_gae(device: torch.device, *, horizon: int, num_rows: int) -> None:
    """The GAE kernel against the loop on the CPU, with and without truncated episodes."""
    generator = torch.Generator().manual_seed(num_rows)
    rewards, values, final_values = torch.randn(3, horizon, num_rows, generator=generator)
    dones = torch.rand(horizon, num_rows, generator=generator) < 0.05
    truncated, last = final_values * dones, torch.randn(num_rows, generator=generator)
    for columns in ((rewards, values, dones, truncated, last), (rewards, values, dones, None, last)):
        plain = compute_gae(*columns, gamma=0.99, gae_lambda=0.95)
        on_device = [None if column is None else column.to(device) for column in columns]
        fused = compute_gae(*on_device, gamma=0.99, gae_lambda=0.95, use_kernels=True)
        torch.testing.assert_close(fused.cpu(), plain, rtol=1e-5, atol=1e-5)


class _Stateful(nn.Module):
    """A policy of which only the size of its state matters."""

    def __init__(self, state_size: int) -> None:
        super().__init__()
        self.state_size = state_size


def _ending_side(
    device: torch.device, num_envs: int, num_agents: int, num_npcs: int, state_size: int
) -> tuple[MixedPolicy, EpisodeMetrics]:
    """What a step's end changes. The NPCs' chances are powers of two: their sums are the same in any precision."""
    spec = EnvSpec(
        name="toy", num_envs=num_envs, num_agents=num_agents, actions=("a",), max_episode_steps=9,
        observation_space=ObservationSpace(kind="vector", shape=(1,), features=("x",)), counters=("hearts", "ore"),
    )  # fmt: skip
    split = assign(num_agents, 0.5 if num_npcs else 1.0, "interleaved")
    npcs = [Npc(name=str(k), policy=_Stateful(state_size)) for k in range(num_npcs)]
    pool = NpcPool(npcs, num_envs=num_envs, num_npc=split.num_npc, device=device) if npcs else None
    if pool is not None:
        pool.probabilities.copy_(dyadic_chances(num_npcs))
    mixed = MixedPolicy(_Stateful(state_size), pool, split, spec, device)
    return mixed, EpisodeMetrics(spec, split, pool, device, count_first=True, count_later=True)


def dyadic_chances(num_npcs: int) -> Tensor:
    """(num_npcs,) powers of two that add up to 1: 1/2, 1/4, ..., the last two equal."""
    chances = 0.5 ** torch.arange(1.0, num_npcs + 1)
    chances[-1] = 1.0 - float(chances[:-1].sum())
    return chances


def check_end_step(
    device: torch.device, *, num_envs: int, num_agents: int, num_npcs: int, state_size: int, num_steps: int = 6
) -> None:
    """`end_step` on the device against EpisodeMetrics.add and MixedPolicy.end_step on the CPU, bit for bit."""
    generator = torch.Generator().manual_seed(num_envs)
    (plain, plain_metrics), (fused, metrics) = (
        _ending_side(where, num_envs, num_agents, num_npcs, state_size) for where in (CPU, device)
    )
    shape = (num_envs, num_agents)
    rewards, dones = (torch.zeros(fused.num_learner_rows, dtype=d, device=device) for d in (torch.float32, torch.bool))
    for _ in range(num_steps):
        ends = torch.rand(num_envs, generator=generator) < 0.3
        result = StepResult(
            rewards=torch.randint(-1, 2, shape, generator=generator) * 0.125,
            dones=ends.unsqueeze(1) | (torch.rand(shape, generator=generator) < 0.1),
            episode_ends=ends,
            counters=torch.randint(0, 9, (*shape, 2), generator=generator).float(),
        )
        uniforms = torch.rand(num_envs, generator=generator)
        for mixed in (plain, fused):
            mixed.learner_state.fill_(1.5)
            if mixed.pool is not None:
                mixed.pool.state.fill_(1.5)
        plain_dones = result.dones[:, plain.learner_seats].flatten()
        plain_metrics.add(result)
        plain.end_step(result, plain_dones, uniforms)
        there = StepResult(
            rewards=result.rewards.to(device), dones=result.dones.to(device),
            episode_ends=result.episode_ends.to(device), counters=result.counters.to(device),
        )  # fmt: skip
        pool = fused.pool
        end_step(
            there, learner_seats=fused.learner_seats, npc_seats=fused.npc_seats, rewards=rewards, dones=dones,
            returns=metrics.returns, is_counting=metrics.is_counting, count_later=True, sums=metrics.sums,
            learner_state=fused.learner_state, npc_state=None if pool is None else pool.state,
            npc_of_env=None if pool is None else pool.npc_of_env,
            probabilities=None if pool is None else pool.probabilities, uniforms=uniforms.to(device),
        )  # fmt: skip
        assert_same("rewards", rewards, result.rewards[:, plain.learner_seats].flatten())
        assert_same("dones", dones, plain_dones)
        assert_same("learner states", fused.learner_state, plain.learner_state)
        for name in ("returns", "is_counting", "sums"):
            assert_same(name, getattr(metrics, name), getattr(plain_metrics, name))
        if plain.pool is not None and pool is not None:
            assert_same("NPC states", pool.state, plain.pool.state)
            assert_same("npc_of_env", pool.npc_of_env, plain.pool.npc_of_env)
    assert plain_metrics.sums[:, 0].sum() > 0, "no episode ended"
    assert plain_metrics.sums[:, 4:].sum() > 0, "nothing was counted"


def busy_actions(arena: Arena, generator: torch.Generator) -> Tensor:
    """(num_envs, num_agents) int64: seats mine, offer and attack where they can, mostly, and wander otherwise."""
    ahead = arena.positions + arena.offsets[arena.facings]
    code = arena.views.view(-1)[ahead + arena.to_views[0]]
    anything = torch.randint(0, len(ACTIONS), arena.positions.shape, generator=generator)
    useful = ((code == MINE) | (code == ALTAR)) & (anything > 1)
    return torch.where((code == FOE) & (anything > 0), 5, torch.where(useful, arena.facings, anything))


def check_arena(
    device: torch.device, config: ArenaConfig, *, num_envs: int, num_steps: int, compare_every: int
) -> None:
    """The arena's kernels and, on a GPU, its torch ops there, against its torch ops on the CPU: bit for bit."""
    generator = torch.Generator().manual_seed(1)
    numbers = range(3, 3 + num_envs)
    twin = Arena(config, num_envs, CPU, env_numbers=numbers)
    others = {"kernels": Arena(config, num_envs, device, env_numbers=numbers)}
    others["kernels"].use_kernels = True
    if device.type != "cpu":
        others["torch ops"] = Arena(config, num_envs, device, env_numbers=numbers)
    for arena in (twin, *others.values()):
        arena.reset(5, stagger=True)
    happened = torch.zeros(4, dtype=torch.float64)
    num_ends = 0
    for step in range(num_steps):
        actions = busy_actions(twin, generator)
        totals = twin.totals.clone()
        wanted = twin.step(actions)
        happened += (twin.totals - totals)[:, ~wanted.episode_ends].sum(dim=(1, 2))
        num_ends += int(wanted.episode_ends.sum())
        for name, arena in others.items():
            result = arena.step(actions.to(device))
            assert_same(f"{name}: rewards", result.rewards, wanted.rewards)
            assert_same(f"{name}: dones", result.dones, wanted.dones)
            assert_same(f"{name}: episode_ends", result.episode_ends, wanted.episode_ends)
            ends = wanted.episode_ends
            assert_same(f"{name}: counters", result.counters.cpu()[ends], wanted.counters[ends])
            if step % compare_every == 0 or step == num_steps - 1:
                for state in (*STATE_NAMES, "view_cells"):
                    assert_same(f"{name}: {state}", getattr(arena, state), getattr(twin, state))
                _check_sight(name, arena, twin, [*range(config.num_agents)][:: 1 - step % 2 * 2])
    assert (happened > 0).all(), f"hearts, ore, attacks, freezes: {happened.tolist()}, so not all was compared"
    assert num_ends > 0, "no episode ended"


def _check_sight(name: str, arena: Arena, twin: Arena, seats: Sequence[int]) -> None:
    """What two groups of seats see."""
    middle = len(seats) // 2
    for group in (seats[:middle], seats[middle:]):
        outs = [
            torch.full((twin.spec.num_envs * len(group), ROW_BYTES), 77, dtype=torch.uint8, device=where.device)
            for where in (arena, twin)
        ]
        for where, out in zip((arena, twin), outs, strict=True):
            where.observe(torch.tensor(group, device=where.device), out)
        assert_same(f"{name}: observations", *outs)
